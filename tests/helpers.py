"""Small real models and data sets for the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from hsft.data.cache import save_cache

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("title", "tag", "description", ":", "item", *map(str, range(40)))

# The two commands that users of the published HSFT know; they must work as they are.
_START = (
    "code/main.py --config_file code/overall/LLM_ddp.yaml code/HLLM/HLLM.yaml --dataset Pixel200K"
    " --loss bce --use_item_cache True --item_cache_path dataset/pixel200k_item_embeddings.pt"
    " --user_pretrain_dir model_checkpoints/UserLLM_complete/"
)
EVALUATE = f"{_START} --item_pretrain_dir model_checkpoints/ItemLLM_complete/ --val_only True"
FINE_TUNE = f"{_START} --use_qlora True"


class ForkServer:
    """The process of tests/fork_server.py, which runs programs in children that it forks.

    Args:
        program: `main` or `item_caching`.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        paths = os.pathsep.join([str(ROOT / "code"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )

    def run(self, argv: Sequence[str], cwd: Path, log: Path, **plan: Any) -> dict[str, Any]:
        """Run a command; the request and the answer are described in tests/fork_server.py."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"argv": list(argv), "cwd": str(cwd), "log": str(log), **plan}
        self._process.stdin.write(json.dumps({"program": self.program, **request}) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Kill the process, which waits for the next request and has nothing to save."""
        self._process.kill()
        self._process.communicate()


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_llama(folder: Path, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """Save a random Llama with a word tokenizer as an ordinary model folder."""
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return make_model(folder, config, seed=seed)


def make_model(folder: Path, config: PretrainedConfig, *, seed: int = 0) -> Path:
    """Save a random decoder of any kind with a word tokenizer as an ordinary model folder."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {"[UNK]": 0, **{word: n for n, word in enumerate(WORDS, start=1)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def make_dataset(
    root: Path, name: str = "tiny", *, users: int = 30, items: int = 20, length: int = 12
) -> Path:
    """Write `dataset/<name>.csv` and `information/<name>.csv` in which users walk along the items."""
    rng = np.random.default_rng(0)
    rows = ["item_id,user_id,timestamp"]
    for user in range(users):
        start = int(rng.integers(items))
        count = length - user % 3
        rows += [f"i{(start + step) % items},u{user},{1000 + step}" for step in range(count)]
    (root / "dataset").mkdir(parents=True, exist_ok=True)
    (root / "information").mkdir(exist_ok=True)
    (root / "dataset" / f"{name}.csv").write_text("\n".join(rows) + "\n")
    texts = ["item_id,title,tag,description"]
    texts += [f"i{n},item {n},{n % 4},{n % 7}" for n in range(items)]
    (root / "information" / f"{name}.csv").write_text("\n".join(texts) + "\n")
    return root


def make_cache(
    path: Path, *, items: int = 20, dim: int = 64, seed: int = 0, pooling: str | None = None
) -> Path:
    """Write a native item cache of random vectors for the items of `make_dataset`."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(items, dim, generator=generator)
    metadata = {"model": "random"} | ({} if pooling is None else {"pooling": pooling})
    save_cache(path, [f"i{n}" for n in range(items)], vectors, metadata)
    return path
