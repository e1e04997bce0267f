"""Generates for requests with different adapters in one batch.

Import this module inside functions only: importing mlx_lm takes a second.
"""

import gc
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlx_dora.adapters.adapter import Adapter
from mlx_dora.adapters.files import read_adapter
from mlx_dora.adapters.gathered import GatheredAdapters
from mlx_dora.errors import DoRAError
from mlx_dora.io.foreign import foreign
from mlx_dora.layers import DoRALayer
from mlx_dora.layers.gathered import BASE
from mlx_dora.serve.config import ServeConfig
from mlx_dora.serve.host import Generator, Provider
from mlx_dora.serve.jobs import Jobs, Kept
from mlx_dora.serve.metrics import Metrics
from mlx_dora.serve.paths import NotServedError
from mlx_dora.serve.prompt_cache import PromptCache
from mlx_dora.serve.registry import Registry, Served
from mlx_dora.serve.rows import AdapterRows, RoutedModel
from mlx_dora.serve.sampling import Samplers


@dataclass
class _Running:
    """A request in the batch."""

    context: Any
    answers: Queue
    detokenizer: Any
    served: Served
    segment_types: list[str] = field(default_factory=list)
    top_logprobs: int = 0


class BatchServer(Generator):
    """Runs one batch, in its own thread, whose rows use different adapters.

    mlx-lm's class starts a new batch for every model and adapter; otherwise this does
    what that does, with its tokenization, stop sequences and prompt cache.

    Args:
        provider: Loads the base model.
        prompt_cache: Caches processed prompts by the adapter's key.
        registry: The served names.
        config: The adapters to load at the start, and the limits.
        metrics: Counts tokens.
    """

    prompt_cache: PromptCache

    def __init__(
        self,
        provider: Provider,
        prompt_cache: PromptCache,
        registry: Registry,
        config: ServeConfig,
        metrics: Metrics,
    ) -> None:
        self.registry = registry
        self.config = config
        self.metrics = metrics
        self.ready = threading.Event()
        self.running: dict[int, _Running] = {}
        self._rows_of: Counter[int] = Counter()
        self._retired: set[int] = set()
        self._jobs = Jobs(self.generation_available)
        self._loading = threading.Lock()
        super().__init__(provider, prompt_cache)  # starts the thread

    # In any thread

    def wait(self) -> None:
        """Wait until the model and the first adapters are loaded.

        Raises:
            DoRAError: If loading them failed.
        """
        while not self.ready.wait(timeout=0.5):
            if not self.generation_available():
                raise DoRAError("the generation thread died.")

    def load_adapter(self, name: str, folder: Path, *, replace: bool) -> None:
        """Read an adapter's folder, and serve it under a name.

        Requests that run keep the adapter that they started with.

        Args:
            name: The name.
            folder: The adapter's folder.
            replace: Whether the name may be in use.

        Raises:
            DoRAError: If the adapter does not fit the model, the name is in use, or
                there are too many adapters.
        """
        with self._loading:
            self._check_place(name, replace)
            adapter = _read(folder)
            self._jobs.call(lambda: self._adapters.check(name, adapter))
            layers = self._adapters.measure(name)
            self._jobs.call(lambda: self._put(name, folder, layers))

    def unload_adapter(self, name: str) -> None:
        """Stop serving an adapter; requests that run finish with it.

        Raises:
            NotServedError: If no adapter has that name.
        """
        with self._loading:
            served = self.registry.pop(name)
            if served is None:
                raise NotServedError(f"there is no adapter {name!r:.200} to unload.")
            self._jobs.call(lambda: self._retire(served))

    def _check_place(self, name: str, replace: bool) -> None:
        if name in self.registry.base_names:
            raise DoRAError(f"{name!r} is the name of the base model.")
        known = self.registry.find(name) is not None
        if known and not replace:
            raise DoRAError(
                f"an adapter {name!r} is loaded already; unload it first, or give "
                '"load_inplace": true.'
            )
        limit = self.config.max_adapters
        if not known and len(self.registry.names) >= limit:
            raise DoRAError(
                f"{limit} adapters are loaded (--max-adapters); unload one."
            )

    # In the generation thread

    def _generate(self) -> None:
        self._jobs.own()
        stream = mx.default_stream(mx.default_device())
        self.model_provider.load_default()
        model: Any = self.model_provider.model
        model.eval()
        if not self.model_provider.is_batchable:
            raise DoRAError(
                "this model's cache cannot be batched, so it cannot serve several "
                "adapters at once; serve one with --adapter-path."
            )
        self._adapters = GatheredAdapters(model)
        self._samplers = Samplers(self.model_provider.tokenizer)
        for name, folder in self.config.folders().items():
            self.load_adapter(name, folder, replace=False)
        self._batch = BatchGenerator(
            RoutedModel(model, self._adapters),  # pyright: ignore[reportArgumentType] - only called
            completion_batch_size=self.cli_args.decode_concurrency,
            prefill_batch_size=self.cli_args.prompt_concurrency,
            prefill_step_size=self.cli_args.prefill_step_size,
            stream=stream,
        )
        self.ready.set()
        while not self._stop:
            self._jobs.run()
            self._take_requests()
            if self.running:
                self._step()
        self._batch.close()
        # Free the arrays in the thread that made them.
        del self._batch, self._adapters, model, self.prompt_cache
        self.model_provider.reset()
        gc.collect()

    def _put(self, name: str, folder: Path, layers: Mapping[str, DoRALayer]) -> None:
        key = self._adapters.put(layers)
        try:
            with foreign(f"adapter {name!r} into the model"):
                self._try_out(key)
        except BaseException:
            self._adapters.drop(key)
            raise
        before = self.registry.put(Served(name=name, key=key, folder=folder))
        if before is not None:
            self._retire(before)

    def _try_out(self, key: int) -> None:
        """Run a new adapter beside the base, so that its faults meet no request."""
        model: Any = self.model_provider.model
        self._adapters.use([key, BASE])
        for length in (1, 2):
            logits = model(mx.zeros((2, length), dtype=mx.int32))
            if not mx.isfinite(logits[0]).all():
                raise DoRAError("the adapter makes the model's outputs NaN or inf.")

    def _retire(self, served: Served) -> None:
        self.prompt_cache.forget(served.key)
        if self._rows_of[served.key]:
            self._retired.add(served.key)  # until its last request is done
        else:
            self._adapters.drop(served.key)

    def _take_requests(self) -> None:
        """Add all waiting requests to the batch; wait for one if nothing runs."""
        timeout = None if self.running else 0.1
        while (request := self._next_request(timeout)) is not None:
            answers, wanted, args = request
            with Kept(answers.put):
                self._insert(answers, wanted, args)
            timeout = None

    def _insert(self, answers: Queue, wanted: Any, args: Any) -> None:
        served = self.registry.choose(args.model.model, args.model.adapter)
        tokenizer: Any = self.model_provider.tokenizer
        prompt, segments, types, state, _ = self._tokenize(tokenizer, wanted, args)
        if len(prompt) > self.config.max_prompt_tokens:
            raise DoRAError(
                f"the prompt has {len(prompt)} tokens; this server takes at most "
                f"{self.config.max_prompt_tokens} (--max-prompt-tokens)."
            )
        stops, text_machine = self._make_state_machine(
            self.model_provider.model_key, tokenizer, args.stop_words
        )
        cache, rest = self.prompt_cache.fetch_nearest_cache(served.key, prompt)
        if cache is None:
            model: Any = self.model_provider.model
            cache = [*make_prompt_cache(model), AdapterRows([served.key])]
        assert cache[-1].keys == [served.key], "a prompt cache of another adapter"
        cached = len(prompt) - len(rest)
        segments, types = _after(segments, types, cached)
        context = server.GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=text_machine,
            initial_state=state,
            prompt=prompt,
            prompt_cache_count=cached,
        )
        (uid,) = self._batch.insert_segments(
            segments=[segments],
            max_tokens=[args.max_tokens],
            caches=[cache],
            all_tokens=[prompt[:cached]],
            samplers=[self._samplers.sampler(args)],
            logits_processors=[server._make_logits_processors(args)],
            stop_sequences=[stops],
        )
        self.running[uid] = _Running(
            context=context,
            answers=answers,
            detokenizer=tokenizer.detokenizer,
            served=served,
            segment_types=types[::-1],
            top_logprobs=args.top_logprobs,
        )
        self._rows_of[served.key] += 1
        answers.put(context)
        self.metrics.count("prompt_tokens_total", len(prompt), adapter=served.name)
        self.metrics.count("cached_tokens_total", cached, adapter=served.name)

    def _step(self) -> None:
        """Take one step of the batch, and hand out what it gave."""
        prompts, tokens = self._batch.next()
        for response in prompts:
            self.running[response.uid].answers.put(response.progress)
        self._keep_prompts(prompts)
        for response in tokens:
            self._answer(response)
        done = [r.uid for r in tokens if r.finish_reason is not None]
        left = [u for u, one in self.running.items() if one.context._should_stop]
        if gone := [uid for uid in left if uid not in done]:
            self._batch.remove(gone)
        for uid in {*done, *left}:
            self._finish(self.running.pop(uid))

    def _keep_prompts(self, prompts: list[Any]) -> None:
        """Cache each prompt that reached the end of a segment (a system prompt)."""
        ends = [
            response.uid
            for response in prompts
            if response.end_of_segment
            and not response.end_of_prompt
            and self.running[response.uid].segment_types
        ]
        for uid, (cache, tokens) in self._batch.extract_cache(ends).items():
            running = self.running[uid]
            self._keep(running.served, tokens, cache, running.segment_types.pop())

    def _answer(self, response: Any) -> None:
        running = self.running[response.uid]
        if response.finish_reason != "stop":  # the stop token is no text
            running.detokenizer.add_token(response.token)
        if response.finish_reason is not None:
            running.detokenizer.finalize()
        logprobs = response.logprobs
        running.answers.put(
            server.Response(
                running.detokenizer.last_segment,
                response.token,
                logprobs[response.token].item(),
                response.finish_reason,
                server._format_top_logprobs(
                    logprobs, running.top_logprobs, self.model_provider.tokenizer
                ),
            )
        )
        self.metrics.count("generated_tokens_total", 1, adapter=running.served.name)
        if response.finish_reason is not None:
            running.answers.put(None)
            cache, tokens = response.prompt_cache, response.all_tokens
            self._keep(running.served, tokens, cache, "assistant")

    def _keep(self, served: Served, tokens: list[int], cache: Any, kind: str) -> None:
        if served.key not in self._retired:
            self.prompt_cache.insert_cache(
                served.key, tokens[:], cache, cache_type=kind
            )
        if (limit := self.cli_args.prompt_cache_bytes) is not None:
            free = limit - self._batch.prompt_cache_nbytes
            self.prompt_cache.trim_to(n_bytes=free)

    def _finish(self, running: _Running) -> None:
        key = running.served.key
        self._rows_of[key] -= 1
        if not self._rows_of[key]:
            del self._rows_of[key]
            if key in self._retired:
                self._retired.remove(key)
                self._adapters.drop(key)


def _read(folder: Path) -> Adapter:
    """Read an adapter, of which the files may change from then on."""
    try:
        adapter = read_adapter(folder)
        mx.eval(adapter.tensors)
    except OSError as error:
        raise DoRAError(f"{folder} cannot be read: {error.strerror}.") from error
    return adapter


def _after(
    segments: list[list[int]], types: list[str], cached: int
) -> tuple[list[list[int]], list[str]]:
    """Return the segments of a prompt, and their types, without its cached tokens."""
    while segments and cached >= len(segments[0]):
        cached -= len(segments[0])
        segments, types = segments[1:], types[1:]
    return [segments[0][cached:], *segments[1:]], types
