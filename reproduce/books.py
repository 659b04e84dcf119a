"""Repeat what HLLM's README reports on Amazon Books."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reproduce.table import (
    BOTH_LLMS,
    END_TO_END,
    FETCH,
    FETCH_BOTH,
    HLLM,
    IDS,
    TINY_LLAMA,
    Row,
    Table,
    main,
)

_TEXT = ("--text_keys", "[title, description]", "--MAX_TEXT_LENGTH", "256")
_LENGTH = ("--MAX_ITEM_LIST_LENGTH", "50")


def _drawn(number: int) -> tuple[str, ...]:
    return (
        *("--negatives", "sampled", "--num_negatives", str(number)),
        *("--negatives_exclude", "none"),
    )


def _published(checkpoint: str, about: str, published: dict[str, float]) -> Row:
    """Return a row that evaluates a published checkpoint."""
    folders = {side: f"model_checkpoints/{side}LLM_{checkpoint}" for side in ("Item", "User")}
    cache = ("--item_cache_path", f"dataset/amazon_books_{checkpoint}.safetensors")
    items = ("--item_pretrain_dir", folders["Item"])
    return Row(
        f"published-{checkpoint}",
        about,
        published,
        training=(
            *(*HLLM, *items, "--user_pretrain_dir", folders["User"], "--val_only", "True"),
            *(*_LENGTH, *cache),
        ),
        gpu_hours=1,
        caching=(*HLLM, *items, *_TEXT, *cache),
        first=tuple(
            f"python download_{side.lower()}llm.py --checkpoint {checkpoint} --out {folder}"
            for side, folder in folders.items()
        ),
    )


# HLLM's experiments with 28,672 negatives: 56 drawn for each of 512 sequences, which are the last 56 items
# of each user, and histories of 50 items in evaluation.
_NEG_28K = (
    *("--MAX_ITEM_LIST_LENGTH", "55", "--MAX_ITEM_LIST_LENGTH_TEST", "50", "--data_split", "False"),
    *("--train_batch_size", "512", "--negatives", "per_sequence", "--seed", "42"),
)


def _trained(
    name: str,
    about: str,
    published: dict[str, float],
    words: tuple[str, ...],
    gpu_hours: float,
    cost: str,
) -> Row:
    """Return a row that trains both LLMs from TinyLlama."""
    return Row(
        f"end-to-end-{name}",
        f"both LLMs trained from TinyLlama, {about}",
        published,
        training=(*BOTH_LLMS, *END_TO_END, *_TEXT, *words),
        gpu_hours=gpu_hours,
        caching=(*BOTH_LLMS, *_TEXT),
        cost=cost,
        first=FETCH_BOTH,
    )


TABLE = Table(
    "amazon_books",
    "python prepare_data.py hllm-books --reviews ratings_Books.csv --meta meta_Books.json.gz",
    (
        _published(
            "1B_books_neg512",
            "HLLM-1B as published, trained with 512 negatives, evaluated",
            {
                **{"Recall@10": 6.97, "Recall@50": 14.61, "Recall@200": 24.78},
                **{"NDCG@10": 3.98, "NDCG@50": 5.64, "NDCG@200": 7.16},
            },
        ),
        _published(
            "1B_books",
            "HLLM-1B as published, trained with 28,672 negatives, evaluated",
            {
                **{"Recall@10": 9.28, "Recall@50": 17.34, "Recall@200": 27.22},
                **{"NDCG@10": 5.65, "NDCG@50": 7.41, "NDCG@200": 8.89},
            },
        ),
        Row(
            "published-7B_books",
            "HLLM-7B as published, evaluated",
            {},
            training=(),
            gpu_hours=0,
            refused="7B_books is made of Baichuan2-7B, which transformers knows only by code in its "
            "repository, and no such code is run; the row published-1B_books is on the same data",
        ),
        _trained(
            "neg512",
            "512 negatives",
            {"Recall@10": 6.97, "NDCG@10": 3.98},
            (*_LENGTH, "--train_batch_size", "128", *_drawn(512)),
            768,
            "about 2 days on 16 H100",
        ),
        _trained(
            "neg28k",
            "28,672 negatives",
            {"Recall@10": 9.28, "NDCG@10": 5.65},
            (*_NEG_28K, "--scheduler_args.warmup", "0.15"),
            1536,
            "about half a day on 128 A100",
        ),
        Row(
            "sasrec-neg512",
            "SASRec on item ids, 512 negatives",
            {"Recall@10": 5.35, "NDCG@10": 2.98},
            training=(
                *(
                    *IDS,
                    "code/IDNet/sasrec.yaml",
                    *_LENGTH,
                    *_drawn(512),
                    "--train_batch_size",
                    "128",
                ),
                *("--sasrec.hidden_size", "64", "--sasrec.layers", "4", "--sasrec.dropout", "0.5"),
                *("--optim_args.learning_rate", "1e-3", "--optim_args.weight_decay", "0"),
                *("--epochs", "201"),
            ),
            gpu_hours=10,
        ),
        Row(
            "sasrec-1b-neg512",
            "TinyLlama on trained item ids, HLLM's SASRec-1B, 512 negatives",
            {},
            training=(
                *(*IDS, "code/IDNet/llama_id.yaml", "--user_pretrain_dir", TINY_LLAMA, *_LENGTH),
                *(*_drawn(512), "--temperature", "0.05", "--fix_temp", "True"),
            ),
            gpu_hours=48,
            first=FETCH,
        ),
        Row(
            "hstu-large-neg512",
            "HSTU-large on item ids, 512 negatives",
            {"Recall@10": 5.00, "NDCG@10": 2.78},
            training=(*IDS, "code/IDNet/hstu_large.yaml", *_LENGTH),
            gpu_hours=20,
        ),
        Row(
            "hstu-large-neg28k",
            "HSTU-large on item ids, 28,672 negatives and a fixed temperature",
            {"Recall@10": 6.50, "NDCG@10": 4.04},
            training=(
                *(*IDS, "code/IDNet/hstu_large.yaml", *_NEG_28K, "--num_negatives", "null"),
                *("--temperature", "0.05", "--fix_temp", "True"),
            ),
            gpu_hours=20,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE, "reproduce/books.py", sys.argv[1:]))
