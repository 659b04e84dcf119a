"""Item vectors from words alone: TF-IDF of the item texts, cut to its leading singular vectors.

    python experiments/text_vectors.py --dataset beauty --dim 512 --out dataset/beauty_tfidf.safetensors
    python experiments/text_vectors.py --dataset beauty --dim 512 --join dataset/beauty_minilm.safetensors \\
        --out dataset/beauty_both.safetensors

`--join` puts the vectors of another item cache beside them, both scaled to unit length. What is
written is an item cache for `--item_cache_path`, with `--item_adapter linear` before a UserLLM of
another width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "code")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from hsft.data.cache import ItemCache, open_cache, save_cache  # noqa: E402
from hsft.data.files import information_file  # noqa: E402
from hsft.data.item_text import read_plain_texts  # noqa: E402
from hsft.model.tfidf import tfidf_rows  # noqa: E402
from hsft.utils.errors import EXIT_OK, InputError  # noqa: E402
from hsft.utils.program import run_program  # noqa: E402


def tfidf_vectors(texts: Sequence[str], dim: int, device: torch.device) -> Tensor:
    """Return the TF-IDF rows' coordinates along the leading right singular vectors.

    Args:
        texts: [n].
        dim: number of singular vectors.
        device: where they are computed.

    Returns:
        float32 [n, dim].

    Raises:
        InputError: there are not that many.
    """
    rows = tfidf_rows(texts).to(device)
    if dim > min(len(texts), rows.width):
        raise InputError(
            f"--dim {dim}: {len(texts)} texts of {rows.width} words have only "
            f"{min(len(texts), rows.width)} singular vectors; lower it."
        )
    torch.manual_seed(0)
    whole = rows.dense(torch.arange(len(texts), device=device))
    left, values, _ = torch.svd_lowrank(whole, q=min(dim + 32, *whole.shape), niter=4)
    return (left[:, :dim] * values[:dim]).cpu()


def beside(first: ItemCache, second: ItemCache) -> Tensor:
    """Return unit vectors of both caches side by side, in the first one's order.

    Raises:
        InputError: the second one lacks items.
    """
    rows = second.rows_of(first.item_ids)
    if (rows < 0).any():
        lacking = first.item_ids[int((rows < 0).argmax())]
        raise InputError(f"{second.path} lacks the item '{lacking}'; join caches of one dataset.")
    other = second.embeddings[torch.from_numpy(rows)]
    parts = [F.normalize(part.float(), dim=-1) for part in (first.embeddings, other)]
    return torch.cat(parts, dim=-1)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    parser = argparse.ArgumentParser(prog="text_vectors.py", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--text_path", default="information")
    parser.add_argument("--text_keys", nargs="+", default=["title", "tag", "description"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--join", help="an item cache whose vectors are put beside these")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    texts = read_plain_texts(information_file(args.text_path, args.dataset), args.text_keys)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vectors = tfidf_vectors(list(texts.values()), args.dim, device)
    cache = ItemCache(list(texts), vectors)
    if args.join:
        vectors = beside(cache, open_cache(args.join))
    save_cache(args.out, list(texts), vectors.half(), {"model": "tfidf", "pooling": "words"})
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))
