"""Text classifiers: TF-IDF with logistic regression, and a fine-tuned pretrained encoder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from opencharacter import models
from opencharacter.config.evaluation import Encoder, Robustness
from opencharacter.config.placement import Training

TFIDF = "tfidf"
FEATURES = 200_000
"""Number of n-grams kept, the most frequent ones: bounds the memory of large runs."""

Predict = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[str]]
"""Trains a classifier: training texts, their labels and test texts in; labels of the test texts
out."""


def classifier(
    settings: Robustness, texts: Iterable[str], placement: Training, seed: int
) -> Predict:
    """Return the classifier of a recipe.

    Args:
        settings: name the classifier: `tfidf`, or a model that `models.resolve` knows.
        texts: all texts that it will be trained on or label.
        placement: resources for fine-tuning an encoder.
        seed: seed of an encoder's classification head and data order.
    """
    name = settings.classifier
    if name == TFIDF:
        return Tfidf(texts).predict

    def fine_tuned(train: Sequence[str], labels: Sequence[str], test: Sequence[str]) -> list[str]:
        import ray

        task = ray.remote(fine_tune).options(num_cpus=placement.cpus, num_gpus=placement.gpus)
        data = (list(train), list(labels), list(test))
        return ray.get(task.remote(name, *data, settings.encoder, placement.gpus > 0, seed))

    return fine_tuned


class Tfidf:
    """Logistic regression on TF-IDF weights of character n-grams (1 to 4).

    The n-grams of a text are counted once, however often it is used: most of the time of one
    training would be spent on counting them.

    Args:
        texts: all texts that will be used.
    """

    def __init__(self, texts: Iterable[str]):
        self.row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}

    @cached_property
    def counts(self) -> Any:
        """How often each n-gram is in each text, a sparse matrix of shape (texts, n-grams)."""
        from sklearn.feature_extraction.text import CountVectorizer

        ngrams = CountVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False)
        return ngrams.fit_transform(self.row_of)

    def predict(
        self, train: Sequence[str], labels: Sequence[str], test: Sequence[str]
    ) -> list[str]:
        """Train on some of the texts and label others.

        Only the n-grams of the training texts count, the `FEATURES` most frequent of them.
        """
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        known, unknown = (
            self.counts[[self.row_of[text] for text in each]] for each in (train, test)
        )
        total = np.asarray(known.sum(axis=0)).ravel()
        num_kept = min(FEATURES, np.count_nonzero(total))
        kept = np.sort(np.argsort(-total, kind="stable")[:num_kept])
        weights = TfidfTransformer(sublinear_tf=True)
        regression = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
        regression.fit(weights.fit_transform(known[:, kept]), labels)
        return [str(label) for label in regression.predict(weights.transform(unknown[:, kept]))]


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
