"""Run train_draft.py and tell, as one line of JSON at the end, what it opened and imported.

    python scripts/watch_trainer.py --cache cache --out draft --steps 20

``opened``: every file opened (Python's audit hook sees them all) or mapped into memory; ``modules``: sys.modules at the
end.
"""

from __future__ import annotations

import json
import sys

opened: list[str] = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)

import train_draft  # noqa: E402

train_draft.main()
with open("/proc/self/maps", encoding="utf-8") as maps:
    mapped = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
print(json.dumps({"opened": sorted({*opened, *mapped}), "modules": sorted(sys.modules)}))
