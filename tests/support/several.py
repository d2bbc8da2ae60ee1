"""Several processes for a test."""

import torch

from cm_core.parallel import ranks


def run_in_several(work, folder, count=2):
    """Call work(rank, port, folder) in processes, which can meet at the port; an error of theirs is raised here."""
    store = ranks.listen(ranks.LOCAL)
    torch.multiprocessing.spawn(work, (store.port, folder), nprocs=count)
