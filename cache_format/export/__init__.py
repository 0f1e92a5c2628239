"""Export: write a cache as the files that another project's own offline reader opens. One file a layout.

``LAYOUTS`` maps the name on the command line to its layout; ``plan_export`` says what an export will take,
``export`` carries it out.
"""

from cache_format.export.angelslim import ANGELSLIM
from cache_format.export.deepspec import DEEPSPEC
from cache_format.export.interface import ExportFile, Layout, LeftOut, seen_by
from cache_format.export.modelopt import MODELOPT
from cache_format.export.nemo_dspark import NEMO_DSPARK
from cache_format.export.specforge import SPECFORGE
from cache_format.export.speculators import SPECULATORS
from cache_format.export.write_export import ExportPlan, ExportReport, export, plan_export

LAYOUTS = {layout.name: layout for layout in (SPECFORGE, SPECULATORS, MODELOPT, DEEPSPEC, NEMO_DSPARK, ANGELSLIM)}
"""Name -> layout."""

__all__ = [
    "LAYOUTS",
    "ExportFile",
    "ExportPlan",
    "ExportReport",
    "Layout",
    "LeftOut",
    "export",
    "plan_export",
    "seen_by",
]
