"""What an engine does for the trainer, without HTTP: samples, scores, takes weights, sleeps.

Built around vLLM's AsyncLLM. One event loop; weights are taken while nothing is being sampled.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrscale.rollout.vllm.settings import EngineSettings

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

_LOOK_S = 0.5


class Refused(Exception):
    """What is asked does not go with the state of the engine, or failed a check. The words are for people."""


class EngineDesk:
    """The engine of this process."""

    def __init__(self, llm: AsyncLLM, settings: EngineSettings) -> None:
        self._llm = llm
        self._settings = settings
        self._running: set[str] = set()
        self._idle = asyncio.Condition()
        self._reloading = asyncio.Lock()
        """A publication that its trainer gave up may still be at its end when the next one comes."""
        self._numbers = itertools.count()
        self.on_shutdown: Callable[[], None] = lambda: None
        self.version: int | None = None if settings.load_format == "dummy" else 0
        """Of the weights; None until the first ones were published."""
        self.group = ""
        """Token of the trainer's group for weights that the workers are in."""
        self.draining = False
        self.asleep: frozenset[str] = frozenset()
        self._failure = ""

    @classmethod
    def start(cls, settings: EngineSettings) -> EngineDesk:
        """Load the model: the long part of a start."""
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from lrscale.rollout.vllm.plugin import register

        register()
        arguments = settings.engine_arguments()
        arguments["enable_sleep_mode"] = settings.sleep and current_platform.is_sleep_mode_available()
        return cls(AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)), settings)

    async def settle(self) -> None:
        """Before the first request: what vLLM is relied upon for is there, and its processes end with this one."""
        for method in ("end_with_server", "check_latent_steps"):
            await self._llm.collective_rpc(method)

    @property
    def state(self) -> str:
        """`ready`, or why not."""
        if self._llm.errored or self._failure:
            return "failed"
        if self.asleep:
            return "asleep"
        if self.draining:
            return "draining"
        return "ready" if self.version is not None else "without weights"

    def health(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "version": self.version,
            "running": len(self._running),
            "group": self.group,
            "why": self._failure,
        }

    async def generate(
        self, rows: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        """One answer a row as it finishes. Whoever stops listening aborts the rest.

        Raises:
            Refused: there are no weights, or the engine sleeps, drains or has failed.
        """
        if self.state != "ready":
            raise Refused(f"this engine is {self.state}")
        tasks = [asyncio.create_task(self._row(row, self._sampling(sampling, row))) for row in rows]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _row(self, row: Mapping[str, Any], params: SamplingParams) -> dict[str, Any]:
        request = f"{row['key']}-{next(self._numbers)}"
        version = self.version
        final = None
        self._running.add(request)
        try:
            async for output in self._llm.generate({"prompt_token_ids": list(row["prompt"])}, params, request):
                final = output
        except Exception as error:  # noqa: BLE001 - vLLM's own, of many kinds; a cancelled task is none of them
            if self._llm.errored:
                self._failure = f"{type(error).__name__}: {error}"
            return {"key": row["key"], "error": f"{type(error).__name__}: {error}"}
        finally:
            self._running.discard(request)
            async with self._idle:
                self._idle.notify_all()
        if final is None:
            return {"key": row["key"], "error": "vLLM ended the request without an answer"}
        answer = final.outputs[0]
        ids = list(answer.token_ids)
        return {
            "key": row["key"],
            "request": request,
            "token_ids": ids,
            "logprobs": [step[token].logprob for token, step in zip(ids, answer.logprobs or (), strict=True)],
            "latents": self._settings.latents and self._settings.latent_token_id in (*row["prompt"], *ids),
            "finish_reason": answer.finish_reason,
            "version_start": version,
            "version_end": self.version,
        }

    def _sampling(self, sampling: Mapping[str, Any], row: Mapping[str, Any]) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # A CPU engine dies of a seed together with chunked prefill (vLLM 0.32).
        own = {"seed": row["seed"]} if row.get("seed") is not None and not self.on_cpu else {}
        return SamplingParams(**sampling, **own, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)

    @property
    def on_cpu(self) -> bool:
        return self._llm.vllm_config.device_config.device_type == "cpu"

    async def probe(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of every token but the first of each prompt, at temperature 1; 0 at latents."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.version is None or self.asleep:
            raise Refused(f"this engine is {self.state}")
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )

        async def one(prompt: Sequence[int]) -> list[float]:
            request = f"probe-{next(self._numbers)}"
            async for output in self._llm.generate({"prompt_token_ids": list(prompt)}, params, request):
                steps = output.prompt_logprobs
            return [step[token].logprob for token, step in zip(prompt[1:], steps[1:], strict=True)]

        return await asyncio.gather(*(one(prompt) for prompt in prompts))

    async def join_group(self, invitation: Mapping[str, Any]) -> dict[str, Any]:
        """Every worker becomes a member of the trainer's group for weights, in place of one that it was in.

        Raises:
            Refused: one of them cannot.
        """
        async with self._reloading:
            self.group = ""
            self._accepted(await self._answer(self._llm.collective_rpc("join_group", args=(dict(invitation),))))
            self.group = str(invitation["token"])
        return {"group": self.group}

    async def take_weights(self, source: Mapping[str, str], version: int, *, projector_only: bool) -> dict[str, Any]:
        """Load a publication while nothing runs; forget what was cached of the old weights.

        `source` is {manifest: path} or {group: token} (ServedWorker.receive_weights).

        Raises:
            Refused: damaged or in another version: the engine goes on with no weights at all rather than old ones.
        """
        if projector_only and self.version is None:
            raise Refused("this engine has no weights yet: a projector alone is not enough")
        if source.get("group", self.group) != self.group:
            raise Refused(f"this engine is not in the group {source['group']} that weights are broadcast in")
        async with self._reloading:
            await self._answer(self._llm.pause_generation(mode="wait", clear_cache=True))
            self.version = None
            try:
                answers = await self._answer(
                    self._llm.collective_rpc("receive_weights", args=(dict(source), version, projector_only))
                )
            except Exception as error:
                raise Refused(str(error)) from error
            finally:
                await self._answer(self._llm.resume_generation())
            seen = self._accepted(answers)
            if not await self._answer(self._llm.reset_prefix_cache()):
                raise Refused("vLLM did not reset its prefix cache, so old hidden states could be read")
            if set(seen) != {version}:
                raise Refused(f"workers hold the weights of version {seen}, published was {version}")
            self.version = version
        return {"version": version, "workers": len(seen)}

    def _accepted(self, answers: Sequence[Any]) -> Sequence[Any]:
        """Of all workers. A worker that refuses answers with words: vLLM loses count of answers when one raises."""
        words = [answer for answer in answers if isinstance(answer, str)]
        if words:
            raise Refused("; ".join(dict.fromkeys(words)))
        return answers

    async def confirm_version(self, version: int) -> dict[str, Any]:
        """Rename the weights that are there: nothing has changed since."""
        if self.version is None:
            raise Refused("this engine has no weights yet")
        await self._answer(self._llm.collective_rpc("name_version", args=(version,)))
        self.version = version
        return {"version": version}

    async def take_latents(self, requests: Sequence[str]) -> bytes:
        """Latents of finished requests as safetensors, by request."""
        paths = await self._answer(self._llm.collective_rpc("take_latents", args=(list(requests),)))
        path = Path(next(path for path in paths if path))
        try:
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    async def abort(self, requests: Sequence[str] | None) -> int:
        """Stop requests, or all; how many."""
        chosen = [name for name in self._running if requests is None or name in requests]
        await self._llm.abort(chosen)
        return len(chosen)

    async def drain(self) -> None:
        """Take nothing new; returns when what runs has finished."""
        self.draining = True
        async with self._idle:
            await self._idle.wait_for(lambda: not self._running)

    async def sleep(self, level: int) -> bool:
        """Give the GPU's memory away; False on a CPU, where vLLM has nothing to give."""
        if not self._llm.model_config.enable_sleep_mode:
            return False
        await self._answer(self._llm.sleep(level))
        self.asleep = frozenset(("weights", "kv_cache"))
        if level > 1:
            self.version = None
        return True

    async def wake(self, tags: Sequence[str]) -> None:
        if self.asleep:
            await self._answer(self._llm.wake_up(list(tags) or None))
            self.asleep = self.asleep - set(tags) if tags else frozenset()

    def resume(self) -> None:
        """After a drain."""
        self.draining = False

    async def _answer(self, asked: Awaitable[Any]) -> Any:
        """vLLM leaves for ever unanswered what was asked of an engine process that died then. Refused instead."""
        task = asyncio.ensure_future(asked)
        while not (await asyncio.wait((task,), timeout=_LOOK_S))[0]:
            if self._llm.errored:
                task.cancel()
                raise Refused("vLLM's engine process has died")
        return task.result()

    def close(self) -> None:
        self._llm.shutdown()
