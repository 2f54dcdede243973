"""From study folders to one static site. Reads files; knows neither jax nor models.

site.py     writes the site                    page.py     what a page says, in words
pictures/   what is drawn, and the two pens: plotly for the screen, matplotlib for paper
"""

from bnresearch.report.site import write

__all__ = ["write"]
