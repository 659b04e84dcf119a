"""HSFT: fine-tune only the UserLLM of HLLM (arXiv 2409.12740) on cached item embeddings."""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"

# What a Python without this project's packages lacks, and every program needs first.
_FIRST_PACKAGES = ("yaml", "pydantic", "rich", "huggingface_hub")

if sys.platform == "win32":
    # Before anything is imported that Windows lacks, which would end in a traceback.
    sys.stderr.write(
        "error: HSFT runs on Linux and macOS; on Windows use it in WSL2 (wsl --install, then the "
        "README's steps there, with the files on the Linux side).\n"
    )
    sys.exit(2)

_missing = [name for name in _FIRST_PACKAGES if find_spec(name) is None]
if _missing:
    sys.stderr.write(
        f"error: the package {_missing[0]} is missing in {sys.executable}; activate the virtual "
        "environment (. .venv/bin/activate) or run pip install -r requirements.txt.\n"
    )
    sys.exit(2)
