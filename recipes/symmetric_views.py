"""ResNet-50, batch 4096, 300 epochs of ImageNet, with both views drawn from one distribution.

Paper        The paper has no such row. It blurs the first view always and the second one in a tenth
             of cases, and solarizes only the second one. Here both have about the mean of the two:
             they are blurred in half of the cases and solarized in a tenth.
Data, hardware and command are as in recipes/r50_4096.py.
Time         as recipes/r50_4096_300ep.py. It has not been run here.
Expected     No figure is published. The paper's views reach 72.5 linear top-1 with this schedule.

Another recipe takes these views by
    from recipes.symmetric_views import symmetric_views
and the fields --views.view1... and --views.view2... change them, as those of any recipe.
"""

from dataclasses import replace

from recipes.r50_4096_300ep import recipe as base
from shards.views import ViewConfig, ViewsConfig


def symmetric_views(size: int = 224) -> ViewsConfig:
    """Return two views of the same distribution. `size` is the side of a view, in pixels."""
    view = ViewConfig(blur=0.5, solarize=0.1)
    return ViewsConfig(size=size, view1=view, view2=view)


recipe = replace(base, run="runs/symmetric_views", views=symmetric_views())
