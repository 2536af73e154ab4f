"""The site as its readers meet it: nothing missing, every page says where it comes from, and a browser finds nothing to complain about."""
import functools
import html
import http.server
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))
from finish_pages import ARTICLES, COLAB, finish, page_of

NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts]
PAGES = [page_of(p).as_posix() for p in NOTEBOOKS]
SAMPLE = ['index.html', 'papers/l2sp/fig1_lambda.html', 'tutorials/compare.html', 'explanations/l2sp_prior.html', 'api/transfer/l2sp.html', 'api/compare/inspect.html']


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    "The site that `make docs` built, if it is newer than all that it is built from; else one built here."
    built, sources = ROOT/'_docs', [ROOT/'_quarto.yml', *(ROOT/'.ci').glob('*.py'), *(p for p in (ROOT/'nbs').rglob('*') if p.suffix in ('.ipynb', '.css', '.svg', '.yaml'))]
    if (built/'index.html').exists() and (built/'index.html').stat().st_mtime > max(p.stat().st_mtime for p in sources): return built
    folder = tmp_path_factory.mktemp('site')/'docs'
    subprocess.run([sys.executable, '.ci/build_site.py', str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


def read(site, page) -> str: return (site/page).read_text(encoding='utf-8')


def listed(contents) -> list[Path]:
    "The notebooks of a sidebar, in its order."
    found = []
    for entry in [contents] if isinstance(contents, str) else contents:
        if isinstance(entry, dict): found += listed(entry['href'] if 'href' in entry else entry['contents'])
        elif '*' in entry: found += sorted((ROOT/'nbs').glob(f'{entry}.ipynb'))
        else: found.append(ROOT/'nbs'/entry)
    return found


def test_every_notebook_is_in_the_sidebar_once():
    sidebar = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    assert sorted(listed(sidebar)) == NOTEBOOKS
    assert [s.get('section', s.get('text')) for s in sidebar][:2] == ['Home', 'Tutorials']


def test_the_sidebar_keeps_the_order_of_the_numbers(site):
    rooms = re.findall(r'<ul id="quarto-sidebar-section[^>]*>(.*?)</ul>', read(site, 'api/data/cases.html'), re.S)
    data = next(re.findall(r'href="([^"#]+)"', room) for room in rooms if 'href="assets.html"' in room)
    assert data == [page_of(p).name for p in sorted((ROOT/'nbs'/'api'/'data').glob('*.ipynb'))]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=PAGES)
def test_page_says_where_it_comes_from(notebook, site):
    page, path = read(site, page_of(notebook)), notebook.relative_to(ROOT).as_posix()
    foot, = re.findall(r'<p class="page-origin">(.*?)</p>', page)
    assert path in foot
    if subprocess.run(['git', 'log', '-1', '--', path], cwd=ROOT, capture_output=True).stdout:
        assert re.search(r'commit/[0-9a-f]{40}">[0-9a-f]{10}</a>, <time datetime="\d{4}-\d\d-\d\d">', foot)
    offers = re.findall(rf'href="{COLAB}/blob/main/([^"]+)"', page)
    assert offers == ([path] if path.split('/')[1] in ARTICLES else [])


@pytest.mark.parametrize('page', [p for p in PAGES if p.startswith('papers/')])
def test_paper_shows_the_commit_and_date_of_its_results(page, site):
    mark, section = read(site, page).partition('id="provenance')[1:]
    text = html.unescape(re.sub('<[^>]+>', ' ', section.partition('page-origin')[0]))
    if page.endswith('tab_published.html'): assert not mark  # Nothing was run for it
    else: assert re.search(r'\b[0-9a-f]{7,40}\b', text) and ('there are no runs' in text or re.search(r'\b20\d\d-\d\d-\d\d\b', text))


def test_links_within_the_site_lead_somewhere(site):
    text = {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    names = {page: set(re.findall(r'\sid="([^"]+)"', t)) for page, t in text.items()}
    lost = []
    for page, t in text.items():
        for link in re.findall(r'<a [^>]*href="(?!https?:|mailto:|data:)([^"]*)"', t):
            path, _, anchor = html.unescape(link).partition('#')
            target = ((site/page).parent/path).resolve() if path else site.resolve()/page
            key = target.relative_to(site.resolve()).as_posix()
            if not target.exists() or anchor and key in names and anchor not in names[key]: lost.append(f'{page}: {link}')
        lost += [f'{page}: {m}' for m in re.findall(r'\]\([\w./#-]+\.(?:ipynb|html)[^)]*\)', re.sub(r'<pre.*?</pre>', '', t, flags=re.S))]  # Markdown that was not read: a link within a link
    assert not lost


def test_pages_are_finished_once():
    page = '<main><header id="title-block-header"><h1 class="title">T</h1></header><p>text</p></main>'
    done = finish(page, ROOT/'nbs'/'tutorials'/'compare.ipynb')
    assert finish(done, ROOT/'nbs'/'tutorials'/'compare.ipynb') == done
    assert re.search('</header><p class="open-in-colab">.*<p>text</p><p class="page-origin">.*</main>$', done)


# A real browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def chromium():
    api = pytest.importorskip('playwright.sync_api')
    program = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not program: pytest.skip('no Chromium on this machine: the pages are not looked at by a browser')
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=['--no-sandbox', '--disable-quic', '--disable-gpu'])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def address(site):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def opened(chromium, address, width=1280, scheme='light'):
    "A tab of its own, the list of what goes wrong in it, and no way out of this machine."
    context = chromium.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
    tab, wrong = context.new_page(), []
    tab.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: wrong.append(str(e)))
    tab.on('requestfailed', lambda r: wrong.append(r.url[:200]) if r.failure != 'net::ERR_ABORTED' else None)  # Left before all had come
    tab.on('response', lambda r: wrong.append(f'{r.status} {r.url}') if r.status >= 400 else None)
    tab.route(lambda url: not url.startswith((address, 'data:')), lambda route: route.abort())
    return tab, wrong


@pytest.fixture(scope='module')
def phone(chromium, address):
    tab, wrong = opened(chromium, address, width=390)
    yield tab, wrong
    tab.context.close()


@pytest.mark.parametrize('page', PAGES)
def test_page_on_a_phone(page, phone, address):
    tab, wrong = phone
    wrong.clear()
    tab.goto(address + page)
    assert not wrong
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390, 'scrolls sideways'
    pictures = tab.evaluate("[...document.querySelectorAll('main img')].map(i => [i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 20, i.alt.trim(), i.closest('.cell')?.id])")
    assert all(seen for seen, _, _ in pictures)
    assert not [cell for _, alt, cell in pictures if not alt], 'cells whose picture has no text'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('page', SAMPLE)
def test_page_is_accessible(page, scheme, chromium, address):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    tab, wrong = opened(chromium, address, scheme=scheme)
    tab.goto(address + page)
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) < 200"
    assert tab.evaluate(dark) == (scheme == 'dark')
    found = [(v['id'], [n['target'] for n in v['nodes']][:3]) for v in axe.run(tab).response['violations'] if v['impact'] in ('serious', 'critical')]
    assert not found and not wrong
    tab.context.close()


def test_search_finds_l2sp(chromium, address):
    tab, wrong = opened(chromium, address)
    tab.goto(address + 'index.html')
    tab.keyboard.press('/')
    tab.keyboard.type('L2SP')
    first = tab.locator('.search-result').first
    first.wait_for(timeout=10_000)
    assert any('transfer/l2sp.html' in r.get_attribute('href') for r in tab.locator('.search-result').all())
    tab.keyboard.press('Enter')
    tab.wait_for_url(lambda url: 'index.html' not in url)
    assert 'l2sp' in tab.content().lower() and not wrong
    tab.context.close()


FOCUS = """() => {
    const e = document.activeElement, s = getComputedStyle(e), box = e.getBoundingClientRect()
    const places = {search: '#quarto-search input', theme: '.quarto-color-scheme-toggle', sidebar: '#quarto-sidebar *', contents: '#TOC *', text: 'main *', foot: '.footer *'}
    const place = Object.keys(places).find(k => e.matches(places[k])) || (e === document.body ? 'end' : 'other')
    return [place, box.width > 0 && s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2, e.outerHTML.slice(0, 150)]
}"""


def test_keyboard_reaches_everything(chromium, address):
    tab, wrong = opened(chromium, address)
    tab.goto(address + 'tutorials/compare.html')
    seen, hidden = set(), []
    for _ in range(400):
        tab.keyboard.press('Tab')
        place, visible, element = tab.evaluate(FOCUS)
        if place == 'end': break
        seen.add(place)
        if not visible: hidden.append(element)
    assert not hidden and {'search', 'theme', 'sidebar', 'contents', 'text', 'foot'} <= seen
    assert tab.evaluate("[...document.querySelectorAll('pre, .cell-output-display')].every(e => e.scrollWidth <= e.clientWidth + 1 || e.tabIndex === 0)")
    tab.context.close()


def test_theme_and_folds_answer_the_enter_key(chromium, address):
    tab, wrong = opened(chromium, address)
    tab.goto(address + 'index.html')
    def background(): return tab.evaluate('getComputedStyle(document.body).backgroundColor')
    light = background()
    tab.locator('.quarto-color-scheme-toggle').press('Enter')
    tab.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert background() != light
    tab.reload()
    assert background() != light, 'the choice is remembered'
    fold = tab.locator('#quarto-sidebar [data-bs-toggle=collapse].sidebar-link').first
    assert fold.get_attribute('aria-expanded') == 'true'
    fold.press('Enter')
    assert fold.get_attribute('aria-expanded') == 'false' and not wrong
    tab.context.close()


def test_mathematics_needs_no_network(chromium, address):
    tab, wrong = opened(chromium, address)
    tab.goto(address + 'explanations/l2sp_prior.html')
    boxes = tab.evaluate("[...document.querySelectorAll('main math')].map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height])")
    assert len(boxes) > 20 and all(w > 3 and h > 3 for w, h in boxes)
    prose = tab.evaluate("[...document.querySelectorAll('main p, main li')].map(p => p.innerText).join('\\n')")
    assert not re.search(r'\\\(|\\\[|\\frac', prose) and not wrong
    tab.context.close()


def test_prints_without_what_is_for_the_screen(chromium, address):
    tab, _ = opened(chromium, address, scheme='dark')
    tab.goto(address + 'papers/l2sp/fig1_lambda.html')
    tab.emulate_media(media='print')
    assert tab.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    assert not any(tab.locator(s).first.is_visible() for s in ('#quarto-header', '#quarto-sidebar', '.open-in-colab'))
    assert tab.locator('h1').first.is_visible()
    tab.context.close()
