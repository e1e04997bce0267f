"""The loss of GRPO, a pure function of the log-probabilities of completions."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.train.grpo.config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Loss of a batch of completions.

    Args:
        value: Loss, a float32 scalar. The loss of several batches is the mean of their
            values, weighted by `count`.
        count: Number of tokens (dapo) or of completions (otherwise), an int32 scalar.
        kl: Mean KL divergence to the reference per token; None without a reference.
        clipped: Share of the tokens whose ratio is clipped; with ratios of sequences,
            share of the sequences.
    """

    value: mx.array
    count: mx.array
    kl: mx.array | None
    clipped: mx.array


def policy_loss(
    logps: mx.array,
    advantages: mx.array,
    mask: mx.array,
    config: RewardConfig,
    *,
    old: mx.array | None = None,
    reference: mx.array | None = None,
) -> PolicyLoss:
    r"""Clipped policy gradient of each token, normalized as ``loss_type`` says.

    .. math:: L_t = -\min(r_t A,\ \mathrm{clip}(r_t, 1 - \epsilon, 1 + \epsilon_h) A)
              + \beta w_t (e^{d_t} - d_t - 1),
              \quad r_t = \frac{\pi(t)}{\pi_\mathrm{old}(t)},
              \quad d_t = \log\frac{\pi_\mathrm{ref}(t)}{\pi(t)}

    GRPO, arXiv:2402.03300, Eq. 3 and 4, as in TRL 1.16: the ratio r is at most `delta`
    in the first term, if set; w is r with ``use_bias_correction_kl``, else 1; with
    ``importance_sampling_level`` ``sequence`` (GSPO, arXiv:2507.18071) log r is its
    mean over the completion.

    Args:
        logps: Log-probability of each token under the current policy. Shape
            ``(rows, length)``, float32.
        advantages: Advantage of each completion. Shape ``(rows,)``.
        mask: Whether a token belongs to the completion. Shape ``(rows, length)``.
        config: The choices.
        old: Log-probabilities of the policy that sampled, in the form of `logps`; None
            if it is the current one.
        reference: Log-probabilities of the reference policy; needed if ``beta`` is not
            0, unused otherwise.
    """
    old = mx.stop_gradient(logps) if old is None else old
    mask = mask.astype(mx.float32)
    # Padding has no meaningful ratio: 0 * inf would be NaN.
    log_ratio = mx.where(mask > 0, logps - old, 0.0)
    if config.importance_sampling_level == "sequence":
        count = mx.maximum(mask.sum(-1, keepdims=True), 1)
        log_ratio = log_ratio.sum(-1, keepdims=True) / count
    ratio = mx.exp(log_ratio)
    gain = advantages.astype(mx.float32)[:, None]
    low, high = config.clip
    clipped = mx.clip(ratio, low, high)
    bounded = ratio if config.delta is None else mx.minimum(ratio, config.delta)
    losses = -mx.minimum(bounded * gain, clipped * gain)
    kl = None
    if config.beta:
        assert reference is not None
        gap = mx.where(mask > 0, reference - logps, 0.0)
        divergence = mx.exp(gap) - gap - 1
        if config.use_bias_correction_kl:
            divergence = divergence * ratio
        losses = losses + config.beta * divergence
        kl = (divergence * mask).sum() / mx.maximum(mask.sum(), 1)
    is_clipped = ((ratio < low) & (gain < 0)) | ((ratio > high) & (gain > 0))
    places = mx.ones_like(is_clipped) if is_clipped.shape[1] == 1 else mask
    share = (is_clipped * places).sum() / mx.maximum(places.sum(), 1)
    value, count = _normalized(losses * mask, mask, config)
    return PolicyLoss(value=value, count=count, kl=kl, clipped=share)


def _normalized(
    losses: mx.array, mask: mx.array, config: RewardConfig
) -> tuple[mx.array, mx.array]:
    """The loss of a batch and its count, from the losses of its tokens."""
    rows = mask.shape[0]
    if config.loss_type == "grpo":
        return (losses.sum(-1) / mx.maximum(mask.sum(-1), 1)).mean(), mx.array(rows)
    if config.loss_type == "dr_grpo":
        value = losses.sum() / (rows * config.max_completion_length)
        return value, mx.array(rows)
    tokens = mask.sum()
    value = losses.sum() / mx.maximum(tokens, 1)
    count = tokens.astype(mx.int32) if config.loss_type == "dapo" else mx.array(rows)
    return value, count
