"""Planted faults: a matrix that cannot fail proves nothing, so each fault must fail its row."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import matrix
import undertow as ut
from matrix import Case
from undertow import adjoint, cache, execute, masks, store
from undertow.methods import trm_block

TIME = Case("gpt2", None, ut.T2MLR(1, 2))
LRT = Case("gpt2", None, ut.LRT(2))


def check(monkeypatch, row, case, plant):
    row(case)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        row(case)


def future_key(patch):
    make = masks.Masks._make

    def leaky(self, positions, keys, window):
        allowed = make(self, positions, keys, window)
        if allowed is None or len(positions) < 2:
            return allowed
        allowed = allowed.expand(-1, -1, len(positions), keys).clone()
        allowed[..., 0, -1] = True  # the first query sees the last key
        return allowed

    patch.setattr(masks.Masks, "_make", leaky)


def test_planted_future_key_fails_causality(monkeypatch):
    check(monkeypatch, matrix.row_5_causal, TIME, future_key)


def test_planted_bidirectional_block_fails_causality(monkeypatch):
    def plant(patch):
        attend = F.scaled_dot_product_attention
        both_ways = SimpleNamespace(silu=F.silu, scaled_dot_product_attention=lambda q, k, v, **kw: attend(q, k, v))
        patch.setattr(trm_block, "F", both_ways)

    check(monkeypatch, matrix.row_5_causal, Case("gpt2", ut.TRMBlock(inner=1), None), plant)


def test_planted_pads_that_leave_memory(monkeypatch):
    def plant(patch):
        leave = execute.Executor.leave
        patch.setattr(
            execute.Executor, "leave", lambda self, s, f, seq: leave(self, s, f, execute.replace(seq, real_BT=None))
        )
        shifted = execute.shifted
        patch.setattr(execute, "shifted", lambda m, seq, p: shifted(m, execute.replace(seq, inside_BT=None), p))

    check(monkeypatch, matrix.row_4_padded_equals_single, TIME, plant)


def test_planted_memory_across_documents(monkeypatch):
    def plant(patch):
        shifted = execute.shifted
        patch.setattr(execute, "shifted", lambda m, seq, p: shifted(m, execute.replace(seq, inside_BT=None), p))

    check(monkeypatch, matrix.row_7_packed_equals_separate, TIME, plant)


def test_planted_attention_across_documents(monkeypatch):
    def plant(patch):
        init = masks.Masks.__init__
        patch.setattr(masks.Masks, "__init__", lambda self, T, past, documents, *rest: init(self, T, past, None, *rest))

    check(monkeypatch, matrix.row_7_packed_equals_separate, Case("gpt2"), plant)


def test_planted_memory_that_skips_positions(monkeypatch):
    def plant(patch):
        shifted = execute.shifted

        def skipping(memory, seq, positions):
            even = torch.tensor([p % 2 == 0 for p in positions])
            return shifted(memory, seq, positions) * even[:, None, None]

        patch.setattr(execute, "shifted", skipping)

    check(monkeypatch, matrix.row_2_executor_equals_references, TIME, plant)


def test_planted_beams_that_leave_the_memory_behind(monkeypatch):
    def plant(patch):
        patch.setattr(cache.UndertowCache, "_move", lambda self, change: None)

    check(monkeypatch, matrix.row_9_generate, TIME, plant)


def test_planted_shared_slot_in_decoding(monkeypatch):
    def plant(patch):
        commit = cache.UndertowCache.commit

        def shared(self, written, *rest):
            first = next(iter(written))
            commit(self, {slot: written[first] for slot in written}, *rest)

        patch.setattr(cache.UndertowCache, "commit", shared)

    check(monkeypatch, matrix.row_3_cached_equals_full, Case("gpt2", ut.ReuseMap([2, 1, 1, 1]), None), plant)


def test_planted_cache_without_memory(monkeypatch):
    def plant(patch):
        commit = cache.UndertowCache.commit
        patch.setattr(cache.UndertowCache, "commit", lambda self, w, m, d, n: commit(self, w, None, d, n))

    check(monkeypatch, matrix.row_3_cached_equals_full, LRT, plant)


def test_planted_stale_keys_of_a_subset(monkeypatch):
    """A sweep over a subset that forgets to write its keys and values."""

    def plant(patch):
        update = store.View.update

        def forgetful(self, k, v, *args, **kwargs):
            if self.positions.step > 1:
                self.shares = True
            return update(self, k, v, *args, **kwargs)

        patch.setattr(store.View, "update", forgetful)

    check(monkeypatch, matrix.row_6_exact_limits, LRT, plant)


def test_planted_adjoint_one_product_short(monkeypatch):
    from test_adjoint import test_adjoint_k_is_k_plus_one_live_sweeps as row

    def plant(patch):
        product = adjoint._Parallel
        patch.setattr(adjoint, "_Parallel", lambda k, *rest: product(max(k - 1, 1), *rest))

    check(monkeypatch, lambda case: row(ut.T2MLR(1, 2), 3), TIME, plant)
