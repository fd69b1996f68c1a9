# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Judge reports by a language model: ask for each comparison in both orders, and reuse answers from the file."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from ...provenance import without_place
from . import JudgeError
from .answers import ORDERS, AnswerFile, answer_key
from .prompt import DIMENSIONS, SHA256, Answer, prompt_text, read_answer
from .server import ChatServer, Reply, RequestRefused, ServerFailed
from .verdicts import Comparison, Verdicts

CHARACTERS_PER_TOKEN = 4  # rough average for English
ANSWER_TOKENS = 350  # rough length of an answer with its evidence
FAILURES = 3  # consecutive failures after which the run stops

Progress = Callable[[int, int], None]


class Question(NamedTuple):
    """One comparison in one order."""

    row: int
    order: int
    key: str
    comparison: Comparison

    def prompt(self, problem: str = "") -> str:
        truth, first, second = self.comparison
        shown = (first, second) if ORDERS[self.order] == "AB" else (second, first)
        return prompt_text(truth, *shown, problem)


class ModelJudge:
    """
    Judge that asks a language model.

    Args:
        orders: 2 to ask in both orders; 1 to ask in one, chosen by a hash of the texts (the paper draws it at random).
        workers: number of parallel requests.
    """

    dimensions = DIMENSIONS

    def __init__(self, server: ChatServer, answers: AnswerFile, *, orders: int = 2, workers: int = 1):
        if orders not in (1, 2):
            raise JudgeError(f"orders: {orders} (expected 1 or 2)")
        self.server, self.answers, self.orders, self.workers = server, answers, orders, workers
        self._servers = {server.name}
        self._lock = threading.Lock()
        self.tokens = {"prompt": 0, "completion": 0, "requests": 0, "uncounted": 0}  # spent in this run

    @property
    def signature(self) -> str:
        """Signature of the verdicts; it names every server whose answers were used, including those of the file."""
        fields = ["judge", "pairwise", f"dims:{len(DIMENSIONS)}", f"orders:{self.orders}", f"prompt:{SHA256}"]
        model = without_place(self.server.model).replace("|", ",")  # a local server may name it by its folder
        fields += [f"model:{model}", f"server:{','.join(sorted(self._servers))}"]
        return "|".join(fields if self.server.form.temperature else [*fields, "temperature:server's"])

    def questions(self, comparisons: Sequence[Comparison]) -> list[Question]:
        """Return all questions of the comparisons, answered or not."""
        asked = []
        for row, comparison in enumerate(comparisons):
            orders = range(2) if self.orders == 2 else [_drawn_order(comparison)]
            for order in orders:
                key = answer_key(self.server.model, ORDERS[order], *comparison)
                asked.append(Question(row, order, key, comparison))
        return asked

    def plan(self, comparisons: Sequence[Comparison]) -> dict[str, int]:
        """
        Estimate the cost before asking.

        Returns:
            "answers", the number needed; "kept", the number already in the file; "prompt" and "completion", the
            estimated tokens of the others.
        """
        asked = {question.key: question for question in self.questions(comparisons)}
        left = [question for question in asked.values() if question.key not in self.answers.answers]
        characters = sum(len(question.prompt()) for question in left)
        tokens = {"prompt": characters // CHARACTERS_PER_TOKEN}
        tokens["completion"] = len(left) * min(ANSWER_TOKENS, self.server.max_tokens)
        return {"answers": len(asked), "kept": len(asked) - len(left), **tokens}

    def judge(self, comparisons: Sequence[Comparison], on_progress: Progress = lambda done, total: None) -> Verdicts:
        """
        Judge comparisons. Answers are stored as they arrive, so a failed run loses none.

        Args:
            on_progress: called about once a second with the number of answers so far and in all.

        Raises:
            JudgeError: the server is unreachable, or does not accept the requests.
        """
        questions = self.questions(comparisons)
        unanswered = self._ask_all(questions, on_progress)
        positions = np.full((len(comparisons), 2, len(DIMENSIONS)), np.nan)
        refused, repaired = Counter(), 0
        for question in questions:
            record = self.answers.answers.get(question.key)
            if record is None:
                refused[unanswered[question.key]] += 1
                continue
            winners = [record["winners"][name] for name in DIMENSIONS]
            positions[question.row, question.order] = [{"A": 1, "B": 0, None: np.nan}[winner] for winner in winners]
            repaired += record["repaired"]
            if record["problem"]:
                refused[record["refusal"]] += 1
            self._servers.add(record["server"])
        won = np.stack([positions[:, 0], 1 - positions[:, 1]], axis=1)  # by the first system
        if self.orders == 1:
            drawn = [_drawn_order(comparison) for comparison in comparisons]
            rows = np.arange(len(comparisons))
            won, positions = won[rows, drawn][:, None], positions[rows, drawn][:, None]
        return Verdicts(DIMENSIONS, won.mean(axis=1), positions, dict(refused), repaired)

    def _ask_all(self, questions: Sequence[Question], on_progress: Progress) -> dict[str, str]:
        """Ask the questions without a stored answer. Return the failures by key."""
        left = {question.key: question for question in questions if question.key not in self.answers.answers}
        total = len({question.key for question in questions})
        unanswered, failures, done = {}, 0, total - len(left)
        on_progress(done, total)
        waiting = list(reversed(left.values()))
        with ThreadPoolExecutor(self.workers) as pool:
            under_way: dict[Future, Question] = {}
            while waiting or under_way:
                # Send one request alone first, to find out which fields the server accepts.
                at_once = self.workers if self.server.answered else 1
                while waiting and len(under_way) < at_once:
                    question = waiting.pop()
                    under_way[pool.submit(self._ask_and_keep, question)] = question
                for future in wait(under_way, timeout=1, return_when=FIRST_COMPLETED).done:
                    question = under_way.pop(future)
                    try:
                        future.result()
                        failures = 0
                    except RequestRefused as error:
                        unanswered[question.key] = str(error)
                    except ServerFailed as error:
                        unanswered[question.key] = str(error)
                        failures += 1
                        if failures == FAILURES or not self.server.answered:
                            raise
                    done += 1
                on_progress(done, total)
        return unanswered

    def _ask_and_keep(self, question: Question) -> None:
        """Ask and store in the worker, so that an answer is stored even if the run ends meanwhile."""
        record = self._ask(question)
        with self._lock:
            self.answers.add(record)

    def _ask(self, question: Question) -> dict:
        """Return the record of an answer. If winners are missing, ask again and keep the more complete answer."""
        answer, refusal = None, ""
        for _ in range(2):
            reply = self.server.ask(question.prompt(answer.problem if answer else ""))
            self._count(reply)
            latest = read_answer(reply.text)
            if answer is None or latest.decided >= answer.decided:
                answer, refusal = latest, _refusal(latest, reply.text)
            if not answer.problem:
                break
        return {
            "key": question.key,
            "prompt": SHA256,
            "model": self.server.model,
            "server": self.server.name,
            "order": ORDERS[question.order],
            "winners": answer.winners,
            "evidence": answer.evidence,
            "reason": answer.reason,
            "problem": answer.problem,
            "refusal": refusal,
            "repaired": answer.repaired,
        }

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self.tokens["requests"] += 1
            if reply.prompt_tokens is None or reply.completion_tokens is None:
                self.tokens["uncounted"] += 1
                return
            self.tokens["prompt"] += reply.prompt_tokens
            self.tokens["completion"] += reply.completion_tokens


def _refusal(answer: Answer, text: str) -> str:
    """Name the reason for missing winners in a few words, for counting."""
    if not answer.problem:
        return ""
    if not text.strip():
        return "empty answer"
    return "no JSON object with winners" if not answer.decided and "{" not in text else "no choice of A or B"


def _drawn_order(comparison: Comparison) -> int:
    """Choose one of the two orders, always the same for the same texts."""
    return hashlib.sha256("\0".join(comparison).encode("utf-8", "surrogatepass")).digest()[0] % 2
