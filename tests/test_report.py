"The report: everything that the notebooks show, nothing of theirs that runs or loads, and failures where they are seen."
import base64
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from medxfer_nb.repro.page import figure
from medxfer_nb.repro.report import clean_html, read_section, write_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="30"><rect width="90" height="30"/></svg>'
PNG = base64.b64encode(b'\x89PNG a picture').decode()


def executed(folder, name, *outputs, title='Table I: strategies', error=''):
    "An executed notebook with its provenance"
    (folder / 'colorization').mkdir(exist_ok=True)
    cells = [nbformat.v4.new_markdown_cell(f'# {title}\n\n> First <b>claim</b> & more.'), nbformat.v4.new_markdown_cell('## Results'),
             nbformat.v4.new_code_cell('x', outputs=[nbformat.v4.new_output('display_data', o) for o in outputs])]
    path = folder / 'colorization' / f'{name}.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    path.with_suffix('.provenance.json').write_text(json.dumps(dict(error=error, seconds=3.2, started='2026-01-02T03:04:05+00:00', parameters=dict(scale='demo', seeds=[0, 1]),
        git=dict(commit='0123456789abcdef', dirty=True), versions=dict(torch='9.9'), hardware=dict(cpu='CPU', cores=2, memory_gb=8, gpu=None))))
    return path


class References(HTMLParser):
    "Every address and every tag of a page"
    def __init__(self, page):
        super().__init__()
        self.addresses, self.tags, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'link', 'img', 'br'): self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action')]

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_one_offline_page_with_everything(tmp_path):
    table = '<table onclick="x()"><tr><td>0.81 ± 0.02</td></tr></table><script src="https://cdn/x.js">alert(1)</script>'
    path = executed(tmp_path, 'tab1_strategies', {'text/html': table}, {'image/png': PNG}, {'text/markdown': 'Found **three** [links](https://elsewhere)'}, {'text/plain': 'not shown'})
    path.with_suffix('.claims.json').write_text(json.dumps([dict(about='A < B', ours='', published='+5.0 (Table I)', verdict='opposite', words='opposite (demo) · mechanism only')]))
    executed(tmp_path, 'fig4_colours', error='cell 3: ValueError: <no films>', title='Figure 4: colours')
    executed(tmp_path, 'tab3_datasets', title='Table III: data sets')
    (tmp_path / 'failures.json').write_text(json.dumps([dict(what='all coloru seed 1', message='loss is NaN at step 40', log='../store/logs/x.log')]))
    page = write_report(tmp_path).read_text()
    for part in ('0.81 ± 0.02', f'data:image/png;base64,{PNG}', 'A &lt; B', 'opposite (demo) · mechanism only', 'First &lt;b&gt;claim&lt;/b&gt; &amp; more.', '&lt;no films&gt;', 'loss is NaN at step 40',
                 '../store/logs/x.log', '0123456789, with uncommitted changes', '2026-01-02 03:04:05 UTC', 'torch 9.9', '0, 1', 'virtual patients: mechanisms, not clinical numbers',
                 '2 of 3', '<strong>three</strong>', 'always equal or better than DECONV', 'prefers-color-scheme: dark', '@media print'):
        assert part in page, part
    assert 'not shown' not in page and 'alert' not in page and 'onclick' not in page
    assert 'Executed 2026-01-02, commit 0123456789, with uncommitted changes' in page
    found = References(page)
    assert found.open == [] and found.tags.count('script') == 1 and 'dialog' not in found.tags  # That of the page itself
    assert all(a.startswith(('data:', '#', 'colorization/')) for a in found.addresses)
    anchors = [a[1:] for a in found.addresses if a.startswith('#')]
    assert anchors[:4] == ['failures', 'colorization-tab1_strategies', 'colorization-fig4_colours', 'colorization-tab3_datasets']  # In the order in which they are made
    assert all(f'id="{a}"' in page for a in anchors) and all((tmp_path / a).exists() for a in found.addresses if a.startswith('color'))
    assert 'url(' not in page and '@import' not in page and len(page) < 5e6


@pytest.mark.parametrize('line, alt', [('#| fig-alt: "Bars: \\"all\\" is longest."', 'Bars: "all" is longest.'), ('#| fig-alt: Bars that rise.', 'Bars that rise.'), ('#|fig-alt: 12', '12'),
                                       ('#| fig-alt: "never closed', ''), ('#| hide', ''), ('x = "#| fig-alt: no"', '')])
def test_figures_are_told_by_their_cells(tmp_path, line, alt):
    path = executed(tmp_path, 'tab1_strategies', {'image/png': PNG})
    nb = nbformat.read(path, 4)
    nb.cells[-1].source = f'{line}\n#| fig-cap: Mean *AUC*\nplot()'
    nbformat.write(nb, path)
    for _ in range(2):  # The words stay when the saved vectors replace the pixels
        assert [(b.alt, b.caption) for b in read_section(path).blocks] == [(alt, 'Mean AUC')]
        path.with_suffix('.svg').write_text(SVG)
    page = write_report(tmp_path).read_text()
    assert f'alt="{html.escape(alt or "Results", quote=True).replace("&quot;", "&#34;")}"' in page and '<figcaption>Mean AUC</figcaption>' in page


def test_saved_vectors_replace_displayed_pixels(tmp_path):
    path = executed(tmp_path, 'tab1_strategies', {'image/png': PNG})
    path.with_name('tab1_strategies.svg').write_text(SVG)
    path.with_name('tab1_strategies_curves.svg').write_text(SVG)  # Saved, but not displayed
    assert [b.figure[:18] for b in read_section(path).blocks] == ['data:image/svg+xml'] * 2
    path.with_name('tab1_strategies.svg').write_text(SVG + ' ' * 500_000)  # Large: the notebook's pixels are shown
    path.with_name('tab1_strategies_curves.svg').touch()
    assert sorted(b.figure[:15] for b in read_section(path).blocks) == ['data:image/png;', 'data:image/svg+']


def test_verdicts_are_counted_by_the_scale_of_their_runs(tmp_path):
    claims = [dict(about='a', verdict='same direction'), dict(about='b', verdict='opposite', scale='study'), dict(about='c', verdict='opposite', scale='demo')]
    executed(tmp_path, 'tab1_strategies').with_suffix('.claims.json').write_text(json.dumps(claims))
    head = re.sub('<[^>]+>', ' ', re.search('<main>.*?</header>', write_report(tmp_path).read_text(), re.S)[0].split('<p class="scale">Executed')[0])
    own, committed = ' '.join(head.split()).split('Verdicts at demo scale')[1].split('Verdicts at study scale')
    assert own.split() == '1 opposite 1 same direction'.split() and committed.strip() == ', from results committed with the library 1 opposite'


def test_a_notebook_that_is_still_executed_is_left_out(tmp_path):
    executed(tmp_path, 'tab1_strategies')
    (tmp_path / 'colorization/fig4_colours.ipynb').write_text('{"cells": [')
    page = write_report(tmp_path).read_text()
    assert '1 of 1' in page and 'fig4_colours' not in page


@pytest.mark.parametrize('dirty, clean', [('<b onmouseover=x>a</b>', '<b>a</b>'), ('<a href="javascript:x">t</a>', 't'), ('<td colspan="2" style="x">1&lt;2</td>', '<td colspan="2">1&lt;2</td>'),
                                          ('<td colspan="x">', '<td>'), ('<style>p{}</style><iframe src=x>in</iframe>out', 'out'), ('<svg><script>x</script></svg>y', 'y')])
def test_html_of_outputs_is_reduced_to_tables_and_text(dirty, clean): assert clean_html(dirty) == clean


def test_nothing_executed_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='medxfer reproduce'): write_report(tmp_path)


def test_the_look_is_installed_with_the_library(tmp_path):
    "What setuptools would put into a wheel holds layout, style and script"
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', tmp_path, 'egg_info', '--egg-base', tmp_path], cwd=Path(__file__).resolve().parent.parent, check=True, capture_output=True)
    assert {p.name for p in (tmp_path/'medxfer_nb'/'page').iterdir()} == {'page.html', 'page.css', 'page.js', 'reproduce.html', 'compare.html'}


def test_figure_escapes_what_it_is_given():
    made = figure('data:,"><script>', 'a "b" <c>', '<i>', 90)
    assert made.count('<') == 5 and '<figcaption>&lt;i&gt;</figcaption>' in made and 'width="90"' in made
    assert 'figcaption' not in figure('data:,', 'a') and 'width' not in figure('data:,', 'a')
