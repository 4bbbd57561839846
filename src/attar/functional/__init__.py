"""Pure tensor functions that the methods are made of: tensors in, tensors out, no state, no modules."""

from attar.functional.attention import attention_map, attention_transfer, flat_map, resized_map
from attar.functional.codistillation import Psi, codistillation_loss, prediction_churn
from attar.functional.collaborative import (
    CollaborativeTarget,
    MutualTarget,
    collaborative_target,
    error_covariance,
    general_target,
    general_weights,
    linear_weights,
    mutual_divergences,
)
from attar.functional.layers import layer_pairs, linear_ramp
from attar.functional.logits import (
    ensemble_log_probs,
    full_precision,
    gated_logits,
    kl_divergence,
    masked_mean,
    sigmoid_ramp,
)
from attar.functional.mmd import linear_mmd
from attar.functional.neighbours import nearest, squared_distances
from attar.functional.pooling import average_pool
from attar.functional.similarity import batch_similarity, similarity_distance
from attar.functional.world import gathered, rank_and_world

__all__ = [
    "CollaborativeTarget",
    "MutualTarget",
    "Psi",
    "attention_map",
    "attention_transfer",
    "average_pool",
    "batch_similarity",
    "codistillation_loss",
    "collaborative_target",
    "ensemble_log_probs",
    "error_covariance",
    "flat_map",
    "full_precision",
    "gated_logits",
    "gathered",
    "general_target",
    "general_weights",
    "kl_divergence",
    "layer_pairs",
    "linear_mmd",
    "linear_ramp",
    "linear_weights",
    "masked_mean",
    "mutual_divergences",
    "nearest",
    "prediction_churn",
    "rank_and_world",
    "resized_map",
    "sigmoid_ramp",
    "similarity_distance",
    "squared_distances",
]
