"""Several processes for a test."""

from concurrent.futures import ThreadPoolExecutor

from flows.distributed.launch import launch


def run_in_several(work, folder, count=2):
    """Call work(folder) in processes, which can form a group; an error of theirs is raised here."""
    with ThreadPoolExecutor(1) as thread:  # elsewhere the launcher would take the signals of the tests
        return thread.submit(launch, count, work, folder).result()
