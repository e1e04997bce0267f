"""The loss of GRPO, a pure function of the log-probabilities of completions."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_dora.train.grpo.config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Loss of a batch of completions.

    Args:
        value: Loss, a float32 scalar. The loss of several batches of as many
            completions is the mean of their values.
        kl: Mean KL divergence to the reference per token; None without a reference.
        clipped: Share of the tokens whose ratio is clipped; with ratios of sequences,
            share of the sequences.
    """

    value: mx.array
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
    batch_tokens: mx.array | None = None,
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
        batch_tokens: Mean number of tokens, as in `mask`, of the batches that were
            sampled together, a scalar that ``dapo`` divides by; None for those of this
            batch.
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
    value = _normalized(losses * mask, mask, config, batch_tokens)
    return PolicyLoss(value=value, kl=kl, clipped=share)


def _normalized(
    losses: mx.array,
    mask: mx.array,
    config: RewardConfig,
    batch_tokens: mx.array | None,
) -> mx.array:
    """The loss of a batch from those of its tokens, 0 outside the completions."""
    if config.loss_type == "grpo":
        return (losses.sum(-1) / mx.maximum(mask.sum(-1), 1)).mean()
    if config.loss_type == "dr_grpo":
        return losses.sum() / (losses.shape[0] * config.max_completion_length)
    tokens = mask.sum()
    if config.loss_type == "dapo" and batch_tokens is not None:
        tokens = batch_tokens
    return losses.sum() / mx.maximum(tokens, 1)
