"The report pages in a real browser: nothing is loaded, nothing is hidden, and what the script adds works with keys too."
import json
import re

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest

from compare_fakes import fake_results
from medxfer_nb.compare import report
from medxfer_nb.compare.figures import alt_text
from medxfer_nb.compare.judge import judge
from medxfer_nb.compare.power import Parts, plan_more
from medxfer_nb.compare.recommend import recommend
from medxfer_nb.repro.report import data_uri, write_report
from test_site import chromium, opened  # noqa: F401, a fixture

matplotlib.use('Agg')
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="150"><rect width="{}" height="150" fill="#0072B2"/></svg>'
MIXED = ['0.9', '\u22120.2 [\u22120.4, 0.1]', '12 %', '–', '1,234', '0.31 ± 0.02']
TIMES = ['3 h 29 min', '20 min', '45 s', 'nan', '2 days', '50 ms']


def executed(folder):
    "Two papers, with all that a page can hold: verdicts, tables of several kinds, figures wide and small, an error."
    head = '<thead><tr><th></th><th>mixed</th><th>time</th></tr><tr><th>arm</th><th></th><th></th></tr></thead>'
    table = f'<table>{head}<tbody>' + ''.join(f'<tr><th>row {i}</th><td>{m}</td><td>{t}</td></tr>' for i, (m, t) in enumerate(zip(MIXED, TIMES))) + '</tbody></table>'
    wide = '<table><tr>' + ''.join(f'<th>column {i}</th>' for i in range(40)) + '</tr>' + '<tr>' + '<td>0.123456</td>'*40 + '</tr></table>'
    def cell(source, **data): return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output('display_data', {k.replace('_', '/'): v for k, v in data.items()})])
    for paper, name in (('l2sp', 'fig1_lambda'), ('timm', 'tab2_transfer')):
        (folder/paper).mkdir()
        cells = [nbformat.v4.new_markdown_cell('# Figure 1: bars\n\n> The first claim.'), nbformat.v4.new_markdown_cell('## In numbers'), cell('x', text_html=table), cell('x', text_html=wide),
                 cell('#| fig-alt: "A wide blue bar, and nothing else."\nx', **{'image_svg+xml': SVG.format(2400, 2400)}), cell('#| fig-alt: "A small blue bar."\nx', **{'image_svg+xml': SVG.format(300, 300)})]
        path = folder/paper/f'{name}.ipynb'
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        claims = [dict(about='It rises', ours='+0.1 [0.0, 0.2]', published='+0.2', verdict=v, words=v) for v in ('same direction', 'opposite', 'undecided', 'not run')]
        path.with_suffix('.claims.json').write_text(json.dumps(claims))
        path.with_suffix('.provenance.json').write_text(json.dumps(dict(error='cell 3: no films' if paper == 'timm' else '', seconds=3., started='2026-01-02T03:04:05+00:00',
            parameters=dict(scale='demo'), git=dict(commit='0123456789abcdef', dirty=False), versions=dict(torch='9.9'), hardware=dict(cpu='CPU', cores=2, memory_gb=8, gpu=None))))
    (folder/'failures.json').write_text(json.dumps([dict(what='all seed 1', message='loss is NaN at step 40', log='logs/x.log')]))
    return write_report(folder)


def compared(folder, monkeypatch):
    "The page of a comparison; one picture serves for all figures"
    def stand_in(fig, caption='', form='svg'):
        plt.close(fig)
        return report.Picture(data_uri(SVG.format(900, 900).encode(), 'image/svg+xml'), alt_text(fig), caption)
    monkeypatch.setattr(report, 'picture', stand_in)
    monkeypatch.setattr(report, 'plan_more', lambda *a, **k: plan_more(Parts(1e-4, 1e-2, 1e-3), .05, 40, 3))
    results = fake_results('segmentation', arms=('scratch', 'full@a', 'linear_probe@a', 'l2sp@a'), effects={'full@a': .06, 'linear_probe@a': -.08, 'l2sp@a': .12}, seeds=3)
    judgement = judge(results, n=200)
    return report.write_comparison(results, folder, judgement, recommend(results, judgement), virtual=True, notebook=False)


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        found = dict(reproduce=executed(tmp_path_factory.mktemp('reproduce')), compare=compared(tmp_path_factory.mktemp('compare'), patch))
    return {name: path.as_uri() for name, path in found.items()}


@pytest.fixture
def visit(chromium, pages):
    "Opens a page; at the end nothing may have gone wrong and nothing may have been asked from elsewhere"
    tabs = []
    def start(name, width=1280, scheme='light'):
        tab, wrong = opened(chromium, 'file://', width, scheme)
        tabs.append((tab, wrong))
        tab.goto(pages[name])
        return tab
    yield start
    for tab, wrong in tabs:
        assert not wrong
        tab.context.close()


BOTH = pytest.mark.parametrize('name', ['reproduce', 'compare'])
GROUND = 'getComputedStyle(document.body).backgroundColor'


@BOTH
@pytest.mark.parametrize('width', [1280, 390])
def test_fits_and_shows_its_figures(name, width, visit):
    tab = visit(name, width)
    assert tab.evaluate('document.documentElement.scrollWidth') <= width, 'scrolls sideways'
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate('document.documentElement.scrollWidth') <= width, 'what was folded away scrolls the page sideways'
    pictures = tab.evaluate("[...document.querySelectorAll('figure img')].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width, i.alt])")
    assert len(pictures) >= 4 and all(there and 100 < shown <= width and len(alt) > 15 for there, shown, alt in pictures)
    lost = tab.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.hash.slice(1)).filter(id => !document.getElementById(id))")
    assert not lost and tab.locator('nav a').count() >= 4


@BOTH
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_is_accessible(name, scheme, visit):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    tab = visit(name, scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert (sum(map(int, re.findall(r'\d+', tab.evaluate(GROUND)))) < 200) == (scheme == 'dark')
    found = [(v['id'], [n['target'] for n in v['nodes']][:3]) for v in axe.run(tab).response['violations'] if v['impact'] in ('moderate', 'serious', 'critical')]
    assert not found


@BOTH
def test_all_can_be_read_without_the_script(name, chromium, pages):
    with chromium.new_context(java_script_enabled=False, viewport=dict(width=390, height=900)) as context:
        tab = context.new_page()
        tab.goto(pages[name])
        assert tab.locator('button:visible').count() == 0, 'nothing that does nothing'
        assert tab.locator('figure img').first.is_visible() and tab.locator('main table').first.is_visible() and tab.locator('nav a').first.is_visible()
        fold = tab.locator('section details').first
        fold.locator('summary').first.click()
        assert fold.locator(':scope > :not(summary)').first.is_visible()


def column(tab, table, n): return [t.replace('\u2212', '-') for t in tab.locator(f'{table} tbody tr > :nth-child({n})').all_inner_texts()]


def test_tables_sort_by_value(visit):
    tab = visit('reproduce')
    tab.evaluate("[...document.querySelectorAll('table')].find(t => t.textContent.includes('mixed')).id = 'mine'")
    mixed, time, arm = (tab.locator('#mine thead button', has_text=t) for t in ('mixed', 'time', 'arm'))
    first = column(tab, '#mine', 1)
    mixed.click()
    assert [t.split(' ')[0] for t in column(tab, '#mine', 2)] == ['-0.2', '0.31', '0.9', '12', '1,234', '–']
    assert tab.locator('#mine th[aria-sort=ascending]').inner_text().startswith('mixed')
    mixed.press('Enter')
    assert [t.split(' ')[0] for t in column(tab, '#mine', 2)] == ['1,234', '12', '0.9', '0.31', '-0.2', '–'], 'what is not known comes last'
    time.press('Space')
    assert column(tab, '#mine', 3) == ['50 ms', '45 s', '20 min', '3 h 29 min', '2 days', 'nan'] and tab.locator('#mine [aria-sort]').count() == 1
    time.click()
    time.click()
    assert column(tab, '#mine', 1) == first and tab.locator('#mine [aria-sort]').count() == 0, 'the third time it is as it was'
    assert arm.count() == 1


def test_the_table_of_strategies_sorts_by_what_was_computed(visit):
    tab = visit('compare')
    table = tab.locator('table.dense').first
    heads = table.locator('thead th')
    n = next(i for i, text in enumerate(heads.all_inner_texts()) if text.startswith('against'))
    def keys(): return table.locator('tbody tr').evaluate_all(f'rows => rows.map(r => r.cells[{n}].dataset.key)')
    for order in (False, True):
        heads.nth(n).locator('button').click()
        found = [float(k) for k in keys() if re.fullmatch(r'-?[\d.e-]+', k)]
        assert len(found) >= 2 and found == sorted(found, reverse=order)


@BOTH
def test_figures_enlarge(name, visit):
    tab = visit(name)
    button = tab.locator('figure button:visible').last
    before, alt = button.locator('img').bounding_box(), button.locator('img').get_attribute('alt')
    button.evaluate('b => { window.pressed = b; b.focus() }')
    tab.keyboard.press('Enter')
    dialog = tab.locator('dialog[open]')
    dialog.wait_for()
    after = dialog.locator('img').bounding_box()
    assert after['height'] > 1.3*before['height'] and dialog.locator('img').get_attribute('alt') == alt
    assert tab.evaluate("document.activeElement.textContent === 'Close' && document.activeElement.closest('dialog').getAttribute('aria-label')") == alt
    tab.keyboard.press('Escape')
    assert dialog.count() == 0 and tab.evaluate("document.activeElement === window.pressed"), 'focus returns'
    button.click()
    tab.mouse.click(4, 450)
    assert dialog.count() == 0, 'a click beside it closes it'
    button.click()
    tab.get_by_role('button', name='Close').click()
    assert dialog.count() == 0


@BOTH
def test_theme_is_chosen_remembered_and_forgotten(name, visit):
    tab = visit(name, scheme='light')
    light, theme = tab.evaluate(GROUND), tab.get_by_role('button', name='Dark mode')
    assert theme.get_attribute('aria-pressed') == 'false'
    theme.press('Enter')
    dark = tab.evaluate(GROUND)
    assert dark != light and theme.get_attribute('aria-pressed') == 'true'
    tab.reload()
    assert tab.evaluate(GROUND) == dark and theme.get_attribute('aria-pressed') == 'true', 'the choice is remembered'
    theme.press('Space')
    assert tab.evaluate(GROUND) == light and tab.evaluate('localStorage.length') == 0, 'as the system has it: nothing to remember'
    tab.emulate_media(color_scheme='dark')
    tab.locator('#theme[aria-pressed=true]').wait_for()
    assert tab.evaluate(GROUND) == dark
    tab.evaluate("localStorage.setItem('medxfer_nb-theme', 'purple')")
    tab.reload()
    assert tab.evaluate(GROUND) == dark, 'what another wrote there changes nothing'


@BOTH
def test_prints(name, visit):
    tab = visit(name, scheme='dark')
    tab.get_by_role('button', name='Dark mode').click()
    tab.get_by_role('button', name='Dark mode').click()
    pdf = tab.pdf(format='A4')
    assert pdf.startswith(b'%PDF') and 2 <= len(re.findall(rb'/Type\s*/Page\b', pdf)) <= 25
    assert tab.locator('details[open]').count() == 0, 'what was opened for paper is folded again'
    tab.emulate_media(media='print')
    assert tab.evaluate(GROUND) == 'rgb(255, 255, 255)'
    assert not any(tab.locator(s).first.is_visible() for s in ('.navbar', 'nav'))
    hidden = tab.evaluate("[...document.querySelectorAll('details > :not(summary), figure, table, h2')].filter(e => !e.checkVisibility({contentVisibilityAuto: true}) || !e.getBoundingClientRect().height).length")
    assert hidden == 0, 'paper cannot be unfolded'


FOCUS = """() => {
    const e = document.activeElement, s = getComputedStyle(e), box = e.getBoundingClientRect(), bar = document.querySelector('.navbar').getBoundingClientRect().bottom
    if (e === document.body) return null
    const seen = box.width > 0 && s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2 && (e.closest('.navbar') || box.bottom > bar)
    return [[...document.querySelectorAll('*')].indexOf(e), Boolean(seen), e.outerHTML.slice(0, 120)]
}"""


@BOTH
def test_keys_reach_everything(name, visit):
    tab = visit(name, 800)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    tab.wait_for_function("() => [...document.querySelectorAll('main .wide')].every(e => (e.scrollWidth > e.clientWidth) === (e.tabIndex === 0))")
    wanted = tab.evaluate("[...document.querySelectorAll('*')].map((e, i) => e.matches('a[href], button, summary, [tabindex]') && !e.closest('dialog') ? i : -1).filter(i => i >= 0)")
    seen, unseen = [], []
    for _ in range(len(wanted) + 1):
        tab.keyboard.press('Tab')
        if not (at := tab.evaluate(FOCUS)): break
        seen.append(at[0])
        if not at[1]: unseen.append(at[2])
    assert sorted(set(seen)) == sorted(wanted) and not unseen
