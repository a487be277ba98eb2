"""ResNet-50, batch 4096, 300 epochs of ImageNet, with views as SimCLR draws them.

Paper        The paper has no such row. These are the distortions of SimCLR (arXiv 2002.05709,
             appendix A): a color jitter with twice the paper's brightness, contrast and hue and
             four times its saturation, a blur in half of the cases, and nothing solarized. Both
             views are drawn alike. Operations are computed as for all recipes: brightness is added,
             as SimCLR's code does with its option simclrv1. By default that code multiplies by it.
Data, hardware and command are as in recipes/r50_4096.py.
Time         as recipes/r50_4096_300ep.py. It has not been run here.
Expected     No figure is published. The paper's views reach 72.5 linear top-1 with this schedule.

Another recipe takes these views by
    from recipes.simclr_views import simclr_views
and the fields --views.view1... and --views.view2... change them, as those of any recipe.
"""

from dataclasses import replace

from recipes.r50_4096_300ep import recipe as base
from shards.views import ViewConfig, ViewsConfig


def simclr_views(size: int = 224, strength: float = 1.0) -> ViewsConfig:
    """Return two views of SimCLR's distribution.

    Args:
        size: Side of a view, in pixels.
        strength: Factor on the color jitter, at most 1.25. SimCLR takes 1 for ImageNet and 0.5 for
            CIFAR-10.
    """
    view = ViewConfig(
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        blur=0.5,
        solarize=0.0,
    )
    return ViewsConfig(size=size, view1=view, view2=view)


recipe = replace(base, run="runs/simclr_views", views=simclr_views())
