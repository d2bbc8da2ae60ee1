"""Training methods, one paper a file. `StudentMethod` is what a recipe may name under `student.method`."""

from cm_core.methods.cd import CD
from cm_core.methods.ct import CT
from cm_core.methods.ict import ICT

StudentMethod = CD | CT | ICT
