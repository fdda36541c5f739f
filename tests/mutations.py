"""Which tests notice small defects: run by hand, in a copy of the tree.

`python tests/mutations.py TREE` writes each of 25 defects into the package below TREE, one at a time, runs the tests that
should notice it, takes it out again, and prints a table. A defect that no test notices is worth a test.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """A defect: this text of the package, which stands in one place, is replaced."""

    name: str
    text: str
    replacement: str
    tests: str
    """Files or folders below tests/; those that are not there are left out."""


MUTATIONS = [
    Mutation(
        "a window may begin one row too late",
        "rng.integers(0, spare_rows + 1)",
        "rng.integers(0, spare_rows + 2)",
        "data",
    ),
    Mutation(
        "renderings of a sample show one view",
        "return orders[:, :renderings].flatten()",
        "return orders[:, :renderings].flatten() * 0",
        "data",
    ),
    Mutation(
        "the customary test split is trained on",
        "split[data.test] = TEST",
        "split[data.test] = TRAIN",
        "end_to_end/test_run.py evaluate",
    ),
    Mutation(
        "a file is renamed before it is synced",
        "os.fsync(file.fileno())\n                os.replace(temporary",
        "os.replace(temporary",
        "cache/test_durability.py",
    ),
    Mutation(
        "a lock is not taken",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "end_to_end/test_resume.py engines",
    ),
    Mutation(
        "what a module draws is not seeded",
        "torch.default_generator.manual_seed(number)",
        "(number)",
        "training/test_loaded.py",
    ),
    Mutation(
        "gradients of representations count twice",
        "else leaf.grad.mul_(scale)",
        "else leaf.grad.mul_(2 * scale)",
        "memory/test_microbatch.py",
    ),
    Mutation(
        "the loss scale stays in the gradients",
        "torch._foreach_div_(gradients, self.factor)",
        "pass",
        "training/test_loaded.py training/test_ranks.py",
    ),
    Mutation(
        "gradients of lent weights are lost",
        "            tensor.grad = gradient",
        "            tensor.grad = None",
        "memory/test_host.py training/test_loaded.py",
    ),
    Mutation(
        "a rank shares too little of a batch",
        "(rank + 1) * each + min(rank + 1, more))",
        "(rank + 1) * each + min(rank, more))",
        "training/test_ranks.py",
    ),
    Mutation(
        "freed memory still counts",
        "        self.live -= size\n        self._live_by_kind[kind] -= size",
        "        self._live_by_kind[kind] -= size",
        "memory/test_meter.py",
    ),
    Mutation(
        "extract ignores its budget",
        "nonlocal peak\n        meter = meter_for(device, budget)",
        "nonlocal peak\n        meter = meter_for(device, None)",
        "encoder/test_extract.py",
    ),
    Mutation(
        "the largest stage is cut at the dearest place",
        "stop: min((join(totals[start]",
        "stop: max((join(totals[start]",
        "training/test_cutting.py",
    ),
    Mutation(
        "padding is not masked",
        "x = mask_padding(layer(x), lengths)",
        "x = layer(x)",
        "nets training/test_recomputed.py",
    ),
    Mutation(
        "inputs of a window end one frame early",
        "- layer.padding + layer.kernel\n",
        "- layer.padding + layer.kernel - 1\n",
        "training/test_recomputed.py",
    ),
    Mutation(
        "a stream carries too much over",
        "tail = None if last else x[:, ready * self.stride :].clone()",
        "tail = None if last else x[:, max(ready - 1, 0) * self.stride :].clone()",
        "nets/test_streaming.py",
    ),
    Mutation(
        "frames lie elsewhere than is said",
        "middle = (layer.kernel - 1) / 2 - layer.padding",
        "middle = (layer.kernel - 1) / 2",
        "nets encoder/test_load.py",
    ),
    Mutation(
        "a negative may be the target",
        "np.minimum(drawn + (drawn >= target[:, :, None]), starts[-1] - 1)",
        "drawn",
        "objectives",
    ),
    Mutation(
        "checksums of blocks are not compared",
        "if crc32(view[block * size - start : stop * size - start], checksum) != checksums[stop - 1 - before]:",
        "if False:",
        "cache",
    ),
    Mutation(
        "the journal is written before its data are synced",
        "        os.fdatasync(self._descriptor)\n        _record(",
        "        _record(",
        "cache faults/test_crash_at_every_write.py",
    ),
    Mutation(
        "scales of int8 are too small",
        "scales = np.abs(rows).max(axis=axes) / np.float32(127)",
        "scales = np.abs(rows).max(axis=axes) / np.float32(140)",
        "cache/test_quantise.py",
    ),
    Mutation(
        "a stale cache is believed",
        "if fingerprint not in (None, self.layout.fingerprint):",
        "if False:",
        "end_to_end/test_resume.py commands/test_cache_commands.py",
    ),
    Mutation(
        "a damaged checkpoint is believed",
        'if metadata.pop("digest", None) != digest_of_file(arrays, metadata):',
        "if False:",
        "training/test_checkpoint.py",
    ),
    Mutation(
        "the caching pass does not stop",
        '.raise_if_set(f"in the cache of stage {layout.stage}, after row {row}")',
        ".reason and str(row)",
        "end_to_end/test_resume.py",
    ),
    Mutation(
        "the next round keeps the best loss of this one",
        "best_loss=None,\n            plateau_loss=None",
        "best_loss=self.best_loss,\n            plateau_loss=None",
        "end_to_end/test_rounds.py training/test_checkpoint.py",
    ),
]


def main(tree: Path) -> None:
    """Prints a row as soon as a defect is tried."""
    print("| defect | noticed by |\n| --- | --- |")
    for mutation in MUTATIONS:
        places = [path for path in (tree / "layerwise").rglob("*.py") if path.read_text().count(mutation.text) == 1]
        if len(places) != 1:
            print(f"| {mutation.name} | its text stands in {len(places)} files |", flush=True)
            continue
        before = places[0].read_text()
        places[0].write_text(before.replace(mutation.text, mutation.replacement))
        try:
            print(f"| {mutation.name} | {noticed_by(mutation, tree)} |", flush=True)
        finally:
            places[0].write_text(before)


def noticed_by(mutation: Mutation, tree: Path) -> str:
    """The first test that fails."""
    tests = [f"tests/{name}" for name in mutation.tests.split() if (tree / "tests" / name).exists()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=900,
    )
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else "NOT NOTICED" if done.returncode == 0 else done.stdout[-200:].replace("\n", " ")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
