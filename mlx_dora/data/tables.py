"""Reading rows from tables: CSV and Parquet."""

import csv
from pathlib import Path

from mlx_dora.data.config import DataConfig
from mlx_dora.data.rows import Rows
from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign

_LARGEST_CELL = 2**31 - 1  # Python's default is 128 KiB


def read_csv(path: Path, config: DataConfig) -> Rows:
    """Read a CSV file whose first line names the columns.

    Cells are separated by a comma, a semicolon or a tab, whichever the first line has
    most of. An empty cell is empty text.

    Raises:
        DoRAError: If a row does not have a cell for every column, or a quoted cell does
            not end, or the file is not UTF-8.
    """
    csv.field_size_limit(_LARGEST_CELL)
    values, lines, before = [], [], 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            separator = max(",;\t", key=first.count)
            columns = next(csv.reader([first], delimiter=separator), [])
            if not all(columns) or len(set(columns)) < len(columns) or not columns:
                raise DoRAError(
                    f"{path}, line 1: expected the names of the columns, all "
                    f"different; got {', '.join(map(repr, columns)) or 'nothing'}."
                )
            reader = csv.reader(file, delimiter=separator, strict=True)
            for cells in reader:
                line, before = before + 1, 1 + reader.line_num
                if not cells:
                    continue
                if len(cells) != len(columns):
                    raise DoRAError(
                        f"{path}, line {line}: expected {len(columns)} cells "
                        f"({', '.join(columns)}), got {len(cells)}. Quote a cell that "
                        f"contains {separator!r}."
                    )
                values.append(dict(zip(columns, cells, strict=True)))
                lines.append(line)
    except UnicodeDecodeError as error:
        raise DoRAError(f"{path} is not UTF-8: {error}.") from error
    except csv.Error as error:
        raise DoRAError(f"{path}, line {before + 1}: not CSV: {error}.") from error
    if not values:
        raise DoRAError(f"{path} is empty: expected rows below the columns' names.")
    return Rows(values=values, source=str(path), lines=lines, config=config)


def read_parquet(path: Path, config: DataConfig) -> Rows:
    """Read a Parquet file.

    Raises:
        DoRAError: If pyarrow is missing, or the file is damaged or has no rows.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DoRAError(
            f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow."
        ) from None
    with foreign(path):
        values = parquet.read_table(path).to_pylist()
    if not values:
        raise DoRAError(f"{path} has no rows.")
    return Rows(
        values=values,
        source=str(path),
        lines=range(1, len(values) + 1),
        unit="row",
        config=config,
    )
