from mlx_dora.serve.metrics import Metrics


def test_counts_and_times_add_up() -> None:
    metrics = Metrics({("depth", "How deep."): lambda: 2.5})
    for name in ("a", 'q"\\\n', "a"):
        metrics.count("prompt_tokens_total", 3, adapter=name)
    for seconds in (0.01, 0.05, 7.0, 1e6):
        metrics.observe("request_seconds", seconds)
    lines = metrics.render().splitlines()
    assert "# TYPE mlx_dora_depth gauge" in lines
    assert "mlx_dora_depth 2.5" in lines
    assert 'mlx_dora_prompt_tokens_total{adapter="a"} 6' in lines
    assert r'mlx_dora_prompt_tokens_total{adapter="q\"\\\n"} 3' in lines
    buckets = {
        line.split('"')[1]: int(line.split()[-1])
        for line in lines
        if line.startswith("mlx_dora_request_seconds_bucket")
    }
    assert (buckets["0.05"], buckets["5"], buckets["10"]) == (2, 2, 3)
    assert buckets["+Inf"] == 4
    assert "mlx_dora_request_seconds_count 4" in lines
    assert "mlx_dora_first_token_seconds_count 0" in lines
