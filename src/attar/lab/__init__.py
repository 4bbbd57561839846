"""Laboratory: data whose right answer is known, to try methods and theories on without any download."""

from attar.lab.multi_view import Ensemble, MultiView, MultiViewNetwork, MultiViewSamples, SmoothedReLU

__all__ = ["Ensemble", "MultiView", "MultiViewNetwork", "MultiViewSamples", "SmoothedReLU"]
