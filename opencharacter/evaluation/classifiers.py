"""Classifiers of texts: one that needs no weights, and a pretrained encoder, fine-tuned."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from opencharacter import models
from opencharacter.config.placement import Training
from opencharacter.config.recipe import Encoder

TFIDF = "tfidf"
FEATURES = 200_000
"""The commonest n-grams: more than a small run has, and few enough for a large one's memory."""


def guess(
    name: str,
    train: Sequence[str],
    labels: Sequence[str],
    test: Sequence[str],
    encoder: Encoder,
    placement: Training,
    seed: int,
) -> list[str]:
    """Labels for test texts by a classifier that learned from the others.

    Args:
        name: `tfidf`, or a model that `models.resolve` knows.
        train: texts to learn from.
        labels: of those.
        test: texts to label.
        encoder: how an encoder is fine-tuned.
        placement: where.
        seed: of its order and its new layer.
    """
    if name == TFIDF:
        return [str(label) for label in tfidf().fit(train, labels).predict(test)]
    import ray

    task = ray.remote(fine_tune).options(num_cpus=placement.cpus, num_gpus=placement.gpus)
    args = (name, list(train), list(labels), list(test), encoder, placement.gpus > 0, seed)
    return ray.get(task.remote(*args))


def tfidf() -> Any:
    """Character n-grams (1 to 4) weighted by TF-IDF, and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(
        TfidfVectorizer(
            analyzer="char",
            ngram_range=(1, 4),
            lowercase=False,
            sublinear_tf=True,
            max_features=FEATURES,
        ),
        LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced"),
    )


def fine_tune(
    name: str,
    train: list[str],
    labels: list[str],
    test: list[str],
    encoder: Encoder,
    on_gpu: bool,
    seed: int,
) -> list[str]:
    """Fine-tune a pretrained encoder with a new layer on top, and label the test texts."""
    import datasets
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    torch.manual_seed(seed)
    path, names = models.resolve(name), sorted(set(labels))
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))

    def encoded(texts: list[str]) -> dict[str, Any]:
        return dict(tokenizer(texts, truncation=True, max_length=encoder.max_tokens))

    numbers = [names.index(label) for label in labels]
    data = datasets.Dataset.from_dict({**encoded(train), "labels": numbers})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=encoder.epochs,
                per_device_train_batch_size=encoder.batch_size,
                learning_rate=encoder.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=encoder.warmup_ratio,
                weight_decay=encoder.weight_decay,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        asked: Any = datasets.Dataset.from_dict(encoded(test))
        said: Any = trainer.predict(asked).predictions
    return [names[int(i)] for i in said.argmax(-1)]
