"""A data set of a few small videos on disk, and the configuration of a run on it."""

from pathlib import Path

import numpy as np

from shine.config import Config, load_config
from shine.data.annotations import write_jsonl
from shine.data.packing import pack_store

WORDS = ("door", "box", "cup", "book", "bag", "lamp", "towel", "phone")
WIDTH = 8


def tiny_data(root: Path, *, videos: int = 12, queries: int = 2, seed: int = 0) -> Path:
    """Writes train, validation and test files, raw features, negatives and a packed store."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((len(WORDS), WIDTH)).astype(np.float32)
    (root / "features").mkdir(parents=True)
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for number in range(videos):
        split = "train" if number < videos - 4 else ("val" if number < videos - 2 else "test")
        length = int(random.integers(8, 20))
        clips = 0.3 * random.standard_normal((length, WIDTH)).astype(np.float32)
        words = random.permutation(len(WORDS))
        for query in range(queries):
            start = int(random.integers(0, length - 4))
            end = start + int(random.integers(2, 5))
            clips[start:end] += vectors[words[query]]
            names = [WORDS[word] for word in words]
            splits[split].append(
                {
                    "qid": f"v{number}_{split}_{query}",
                    "vid": f"v{number}",
                    "query": f"person sees the {names[query]}.",
                    "duration": float(length),
                    "relevant_windows": [[float(start), float(end)]],
                    "recomposed_queries": [
                        f"person sees the {names[3]}.",
                        f"person opens the {names[4]}.",
                        f"someone opens a {names[5]}.",
                    ],
                }
            )
        np.save(root / "features" / f"v{number}.npy", clips)
    for split, records in splits.items():
        write_jsonl(root / f"{split}.jsonl", records)
    pack_store(tiny_config(root), [f"v{number}" for number in range(videos)])
    return root


def tiny_config(root: Path, *overrides: str) -> Config:
    """A SHINE run of two epochs of a tiny model, without dropout, in this process."""
    return load_config(
        None,
        [
            f"data.root={root}",
            "data.validation={val: val.jsonl}",
            "data.tests={test_trivial: test.jsonl}",
            "evaluate.negatives=test.jsonl",
            "evaluate.bootstrap=20",
            "text.width=8",
            "model.hidden=16",
            "model.heads=2",
            "model.feedforward=16",
            "model.slots=3",
            "model.dropout=0",
            "model.input_dropout=0",
            "loss.intra_weight=1",
            "loss.inter_weight=1",
            "loss.fine_weights=[1, 1, 1, 1]",
            "loss.fine_margins=[0.2, 0.2, 0.2, 0.2]",
            "train.epochs=2",
            "train.batch_size=5",
            "train.num_workers=0",
            "train.learning_rate=0.001",
            *overrides,
        ],
    )
