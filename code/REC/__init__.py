"""HSFT: fine-tune only the UserLLM of HLLM (arXiv 2409.12740) on cached item embeddings."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":
    # Before anything is imported that Windows lacks, which would end in a traceback.
    sys.stderr.write(
        "error: HSFT runs on Linux and macOS; on Windows use it in WSL2 (wsl --install, then the "
        "README's steps there, with the files on the Linux side).\n"
    )
    sys.exit(2)
