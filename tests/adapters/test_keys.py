from mlx_dora.adapters.keys import natural_order


def test_numbers_sort_as_numbers() -> None:
    names = ["layers.10.q", "layers.2.q"]
    assert sorted(names, key=natural_order) == ["layers.2.q", "layers.10.q"]


def test_what_only_looks_like_a_number_is_a_word() -> None:
    names = [f"layers.{part}.q" for part in ("²", "9" * 5000, "3", "")]
    assert sorted(names, key=natural_order)[0] == "layers.3.q"
