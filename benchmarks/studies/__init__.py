"""Published findings made again, most of Gloeckle et al. 2024, each study in a folder of its own.

`grid.py` names the runs of a study, `runner.py` trains and measures what is missing of them, and
`results.py` makes table and page. A study brings its data, its grid and what it measures.
"""
