"""Repeat what HLLM's paper and README report on Pixel8M."""

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
    HSTU_1B,
    HSTU_1B_ABOUT,
    IDS,
    TINY_LLAMA,
    Row,
    Table,
    main,
)

_TEXT = ("--MAX_TEXT_LENGTH", "256")
_SEQUENCES = ("--MAX_ITEM_LIST_LENGTH", "10", "--train_batch_size", "512")
_IMPORTED_ITEMS = ("--item_pretrain_dir", "model_checkpoints/ItemLLM_complete")
_IMPORTED = (
    *(*HLLM, *_IMPORTED_ITEMS),
    *("--user_pretrain_dir", "model_checkpoints/UserLLM_complete"),
)
_FETCH = ("python download_itemllm.py", "python download_userllm.py")
_BASE_CACHE = ("--item_cache_path", "dataset/pixel8m_tinyllama.safetensors")

TABLE = Table(
    "Pixel8M",
    "python prepare_data.py pixelrec --interactions Pixel8M.csv --items item_info.csv --name Pixel8M",
    (
        Row(
            "published-checkpoint",
            "HLLM-1B as published, evaluated",
            {
                **{"Recall@10": 6.13, "Recall@50": 12.48, "Recall@200": 21.18},
                **{"NDCG@10": 3.54, "NDCG@50": 4.92, "NDCG@200": 6.22},
            },
            training=(*_IMPORTED, "--val_only", "True", "--MAX_ITEM_LIST_LENGTH", "10"),
            gpu_hours=1,
            caching=(*HLLM, *_IMPORTED_ITEMS, *_TEXT),
            first=_FETCH,
        ),
        Row(
            "item-cached",
            "UserLLM trained whole on frozen, trained items, here those of the published checkpoint",
            {"Recall@5": 3.585, "Recall@10": 5.218},
            training=(
                *(*HLLM, *_IMPORTED_ITEMS, "--user_pretrain_dir", TINY_LLAMA, "--epochs", "5"),
                *_SEQUENCES,
            ),
            gpu_hours=12,
            caching=(*HLLM, *_IMPORTED_ITEMS, *_TEXT),
            first=(*_FETCH, *FETCH_BOTH),
        ),
        Row(
            "end-to-end",
            "both LLMs trained from TinyLlama",
            {"Recall@5": 4.278, "Recall@10": 6.106, "NDCG@10": 3.54},
            training=(*BOTH_LLMS, *END_TO_END, *_TEXT, *_SEQUENCES, *_BASE_CACHE),
            gpu_hours=3150,
            caching=(*BOTH_LLMS, *_TEXT, *_BASE_CACHE),
            cost="about 4.1 days on 32 A100",
            first=FETCH_BOTH,
        ),
        Row(
            "sasrec",
            "SASRec on item ids, as HLLM trains it",
            {"Recall@10": 5.08, "NDCG@10": 2.92},
            training=(
                *(*IDS, "code/IDNet/sasrec.yaml", "--MAX_ITEM_LIST_LENGTH", "10"),
                *("--train_batch_size", "512", "--epochs", "50", "--stopping_step", "5"),
            ),
            gpu_hours=10,
            cost="8 GPUs",
        ),
        Row(
            "hstu",
            "HSTU on item ids, as HLLM trains it",
            {"Recall@10": 4.83, "NDCG@10": 2.75},
            training=(
                *(*IDS, "code/IDNet/hstu.yaml", "--MAX_ITEM_LIST_LENGTH", "10"),
                *("--train_batch_size", "512", "--epochs", "50", "--stopping_step", "5"),
            ),
            gpu_hours=10,
            cost="8 GPUs",
        ),
        Row(
            "sasrec-1b",
            "TinyLlama on trained item ids, HLLM's SASRec-1B",
            {},
            training=(
                *(*IDS, "code/IDNet/llama_id.yaml", "--user_pretrain_dir", TINY_LLAMA),
                *_SEQUENCES,
            ),
            gpu_hours=350,
            first=FETCH,
        ),
        Row(
            "hstu-1b",
            HSTU_1B_ABOUT,
            {},
            training=(*IDS, *HSTU_1B, *_SEQUENCES),
            gpu_hours=350,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(main(TABLE, "reproduce/pixel8m.py", sys.argv[1:]))
