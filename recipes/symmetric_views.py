"""ResNet-50, batch 4096, 300 epochs of ImageNet, with both views drawn from one distribution.

Paper        table 17, "symmetric blurring/solarization": 72.5 linear top-1, 90.8 top-5, as with the
             paper's own views. Those blur the first view always and the second one in a tenth of
             cases, and solarize only the second one, in a fifth. Here both are blurred in half of
             the cases and solarized in a fifth.
Data, hardware and command are as in recipes/r50_4096.py.
Time         as recipes/r50_4096_300ep.py. It has not been run here.
Expected     72.5 linear top-1

Another recipe takes these views by
    from recipes.symmetric_views import symmetric_views
and the fields --views.view1... and --views.view2... change them, as those of any recipe.
"""

from dataclasses import replace

from recipes.r50_4096_300ep import recipe as base
from shards.views import ViewConfig, ViewsConfig


def symmetric_views(size: int = 224) -> ViewsConfig:
    """Return two views of the same distribution. `size` is the side of a view, in pixels."""
    view = ViewConfig(blur=0.5, solarize=0.2)
    return ViewsConfig(size=size, view1=view, view2=view)


recipe = replace(base, run="runs/symmetric_views", views=symmetric_views())
