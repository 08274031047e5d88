"""Text classifiers: TF-IDF with logistic regression, and a fine-tuned pretrained encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from opencharacter import models
from opencharacter.config.evaluation import Encoder
from opencharacter.config.placement import Training

TFIDF = "tfidf"
FEATURES = 200_000
"""Number of n-grams kept, the most frequent ones: bounds the memory of large runs."""


def predict(
    name: str,
    train: Sequence[str],
    labels: Sequence[str],
    test: Sequence[str],
    encoder: Encoder,
    placement: Training,
    seed: int,
) -> list[str]:
    """Train a classifier and return its labels of the test texts.

    Args:
        name: `tfidf`, or a model that `models.resolve` knows.
        train: training texts.
        labels: labels of the training texts.
        test: texts to label.
        encoder: hyperparameters for fine-tuning an encoder.
        placement: resources for fine-tuning an encoder.
        seed: seed of an encoder's classification head and data order.
    """
    if name == TFIDF:
        return [str(label) for label in tfidf().fit(train, labels).predict(test)]
    import ray

    task = ray.remote(fine_tune).options(num_cpus=placement.cpus, num_gpus=placement.gpus)
    args = (name, list(train), list(labels), list(test), encoder, placement.gpus > 0, seed)
    return ray.get(task.remote(*args))


def tfidf() -> Any:
    """Logistic regression on TF-IDF weights of character n-grams (1 to 4)."""
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
    """Fine-tune a pretrained encoder with a new classification head; label the test texts."""
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

    targets = [names.index(label) for label in labels]
    data = datasets.Dataset.from_dict({**encoded(train), "labels": targets})
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
        test_data: Any = datasets.Dataset.from_dict(encoded(test))
        logits: Any = trainer.predict(test_data).predictions
    return [names[int(i)] for i in logits.argmax(-1)]
