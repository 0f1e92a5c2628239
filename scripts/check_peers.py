"""Other projects' own drafts and losses, fed from a cache by cache_format.adapters and by the target itself.

    python scripts/check_peers.py WORK nemo specforge ...       (the names of EVERY below)

Run by scripts/test_peers.sh, which makes the environment and WORK: ``tiny``, a target, and ``cache``, made of it with
layers 1, 3, 4 and 5 (its last) and last hidden states. Prints, of each draft, how far the losses are apart. What is
done with a project is in peer_checks/, in the file of its name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peer_checks.angelslim import angelslim
from peer_checks.deepspec import deepspec
from peer_checks.modelopt import modelopt
from peer_checks.nemo import nemo
from peer_checks.nemo_dspark import nemo_dspark
from peer_checks.nemo_eagle import nemo_eagle
from peer_checks.specforge import specforge
from peer_checks.specforge_eagle import eagle3
from peer_checks.speculators import speculators

EVERY = (nemo, nemo_dspark, nemo_eagle, specforge, eagle3, speculators, deepspec, modelopt, angelslim)
CHECKS = {check.__name__: check for check in EVERY}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in sys.argv[2:]:
        CHECKS[name](Path(sys.argv[1]).absolute())
    print(json.dumps({"checked": sys.argv[2:]}))
