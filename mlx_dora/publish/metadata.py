"""Metadata of model cards, which extends the metadata of the base's card."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign
from mlx_dora.io.hub_id import hub_id

_CARD = "README.md"

logger = logging.getLogger(__name__)


def card_data(
    base: str,
    kind: str,
    relation: str,
    datasets: Sequence[str] = (),
    perplexity: float | None = None,
) -> ModelCardData:
    """Return the metadata of a card.

    The license, languages and tags come from the base's card, if the base is a local
    folder or a cached snapshot with a card.

    Args:
        base: Name of the base model, as the user gave it; recorded only as a Hub id.
        kind: Kind of fine-tuning, which becomes a tag.
        relation: Relation to the base in the Hub's words: ``"adapter"`` or
            ``"finetune"``.
        datasets: Names of the training data; only Hub ids are recorded.
        perplexity: Perplexity on the validation data; recorded if all data is on the
            Hub.
    """
    name = hub_id(base)
    kept = _kept(base, name)
    tags = [*kept.pop("tags", []), "mlx", kind, "mlx_dora"]
    public = [found for data in datasets if (found := hub_id(data))]
    data: dict[str, Any] = {}
    if name is not None:
        data |= {"base_model": name, "base_model_relation": relation}
    if public:
        data["datasets"] = public
    if perplexity is not None and public and len(public) == len(datasets):
        result = EvalResult(
            task_type="text-generation",
            dataset_type=public[0],
            dataset_name=", ".join(public),
            dataset_split="validation",
            metric_type="perplexity",
            metric_value=perplexity,
        )
        data |= {
            "eval_results": [result],
            "model_name": f"{name or Path(base).name}-{kind}",
        }
    return ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        **kept,
        **data,
    )


def recorded_datasets(folder: str | Path) -> list[str]:
    """Return the data sets that the card in a local folder names."""
    return _texts(_read(Path(folder).expanduser() / _CARD).get("datasets"))


def _kept(base: str, name: str | None) -> dict[str, Any]:
    """Return what a card takes over from the base's card."""
    path = Path(base).expanduser() / _CARD
    if name is not None and name == base:
        cached = try_to_load_from_cache(name, _CARD)
        path = Path(cached) if isinstance(cached, str) else None
    content = {} if path is None else _read(path)
    kept: dict[str, Any] = {"tags": _texts(content.get("tags"))}
    for key in ("license", "license_name"):
        if isinstance(value := content.get(key), str):
            kept[key] = value
    if languages := _texts(content.get("language")):
        kept["language"] = languages
    if isinstance(link := content.get("license_link"), str):
        if "://" in link:
            kept["license_link"] = link
        elif name is not None:  # a file of the base's repository
            kept["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
    return kept


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with foreign(path):
            text = path.read_text(encoding="utf-8-sig")
            if not text.startswith("---"):  # no metadata
                return {}
            return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except DoRAError as error:
        logger.warning("the card takes over nothing from another card: %s", error)
        return {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
