"""Where text comes from: the Hugging Face hub, the same Parquet files in a local folder, or CPython itself.

Every source gives the splits ``train``, ``validation`` and ``test`` as lists of lines.
"""

import glob
import hashlib
import logging
from pathlib import Path

from mat.config import DatasetConfig
from mat.errors import UserError

SPLITS = ("train", "validation", "test")
Splits = dict[str, list[str]]


def load_text(config: DatasetConfig) -> Splits:
    """The corpus, a list of lines per split.

    Args:
        config: The dataset's configuration.

    Returns:
        Lines by split, none of them empty.

    Raises:
        UserError: If files are missing, damaged or empty, with the path and the remedy.
    """
    if config.hub_path is None:
        splits = _pydocs()
    elif config.root is not None:
        splits = _parquet(_folder(config))
    else:
        splits = _hub(config)
    for split, lines in splits.items():
        if not any(line.strip() for line in lines):
            raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")
    return splits


def origin(config: DatasetConfig) -> str:
    """Where the data come from, for messages: the local folder, or the dataset's name."""
    local = config.hub_path is not None and config.root is not None
    return str(_folder(config)) if local else f"dataset={config.name}"


def _folder(config: DatasetConfig) -> Path:
    return Path(str(config.root)).expanduser() / str(config.local_folder)


def source_key(config: DatasetConfig) -> list[str]:
    """What identifies the data: hashes of local files, or the hub's name, or Python's version."""
    if config.hub_path is None:
        import platform

        return ["pydocs", platform.python_version()]
    if config.root is None:
        return [config.hub_path, str(config.hub_name)]
    files = _files(_folder(config))
    keys = []
    for split in SPLITS:
        for file in files[split]:
            with open(file, "rb") as opened:
                keys.append(f"{split}:{hashlib.file_digest(opened, 'sha256').hexdigest()}")
    return keys


def _files(folder: Path) -> dict[str, list[str]]:
    found = {split: sorted(glob.glob(f"{glob.escape(str(folder))}/{split}*.parquet")) for split in SPLITS}
    for split, files in found.items():
        if not files:
            raise UserError(
                f"{folder} has no {split}*.parquet: point dataset.root (or MAT_DATA) at the folder that holds "
                f"{folder.name}/, or set dataset.root=null to load from the hub."
            )
    return found


def _parquet(folder: Path) -> Splits:
    import pyarrow
    import pyarrow.parquet as pq

    splits: Splits = {}
    for split, files in _files(folder).items():
        splits[split] = []
        for file in files:
            try:
                table = pq.read_table(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file} is not a readable Parquet file: copy it again.") from error
            kind = table.schema.field("text").type if "text" in table.column_names else None
            if kind not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(f"{file} has no column 'text' of strings: copy the WikiText Parquet files there.")
            splits[split] += [line or "" for line in table.column("text").to_pylist()]
    return splits


def _hub(config: DatasetConfig) -> Splits:
    from datasets import load_dataset
    from datasets import logging as datasets_logging

    datasets_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        loaded = load_dataset(config.hub_path, config.hub_name)
    except Exception as error:  # the hub's client raises many kinds; all mean that the data could not be had
        raise UserError(
            f"dataset={config.name} could not be loaded from the hub ({type(error).__name__}): check the network, or "
            f"set dataset.root (or MAT_DATA) to a folder that holds {config.local_folder}/*.parquet."
        ) from error
    return {split: list(loaded[split]["text"]) for split in SPLITS}


def _pydocs() -> Splits:
    """English prose that ships with CPython: ``pydoc_data.topics``, every topic in one split."""
    from pydoc_data.topics import topics

    splits: Splits = {split: [] for split in SPLITS}
    for number, name in enumerate(sorted(topics)):
        split = {8: "validation", 9: "test"}.get(number % 10, "train")
        splits[split] += topics[name].splitlines()
    return splits
