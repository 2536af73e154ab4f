"""What the home page shows of the papers, from the outputs that the paper notebooks store: python .ci/home.py

A picture of each paper goes to nbs/images; nbs/index.ipynb gets the captions, the table of what is reproduced, and BibTeX from CITATION.cff.
Nothing of it is typed by hand: a test compares what is committed with what this makes, so a page cannot be stale silently.
"""
import base64
import html
import json
import re
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAPERS, IMAGES, HOME = ROOT/'nbs/papers', ROOT/'nbs/images', ROOT/'nbs/index.ipynb'
# Notebook, cell, which of its pictures (0: this scale, 1: the committed study), and what it shows, for those who do not see it
PICTURES = {
    'colorization/fig4_colours': ('477a0ae5', 0, 'Three virtual chest films and, beside each, the same film in the false colours that two colour modules learned, before and after the whole network was fine-tuned'),
    'l2sp/fig2_overlays': ('36ebea53', 0, 'Three virtual CT slices of lungs with lesions, and what networks trained with λ = 0, 8 and 50 found: mostly true positives, with a rim of false positives that differs little between them'),
    'timm/fig5_ratios': ('b554ab99', 1, 'Mixing ratio of two source networks in each convolution, for three portions of the patients: near one half in the middle of the network, far from it at both ends, with a wide scatter between seeds')}
TITLES = {'colorization': 'X-ray colorization', 'l2sp': 'L2-SP on chest CT', 'timm': 'T-IMM on brain MRI'}
ABOUT = {'colorization': 'learns a small gray-to-RGB module in front of an ImageNet backbone',
         'l2sp': "pulls a U-Net's encoder towards its source weights while the decoder learns from scratch",
         'timm': 'merges pre-trained 3-D networks by their Fisher information, with ratios that are learned layer by layer'}
ORDER = {'colorization': 'tab1 tab2 tab3 fig4 fig5 fig6', 'l2sp': 'fig1 fig2 tab', 'timm': 'tab2 tab3 tab4 fig3 fig4 fig5'}


def cells(item: str) -> list[dict]: return json.loads((PAPERS/f'{item}.ipynb').read_text(encoding='utf-8'))['cells']


def picture(item: str) -> bytes:
    "The stored picture of a notebook"
    cell, n, _ = PICTURES[item]
    found = [o['data']['image/png'] for c in cells(item) if c['id'] == cell for o in c['outputs'] if 'image/png' in o.get('data', {})]
    return base64.b64decode(''.join(found[n]))


def tables(item: str) -> list[list[list[str]]]:
    "Every stored table of a notebook, as rows of texts"
    shown = [''.join(o['data']['text/html']) for c in cells(item) for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    def texts(row): return [html.unescape(re.sub(r'<[^>]+>', '', t)).strip() for t in re.findall(r'<t[hd].*?</t[hd]>', row, re.S)]
    return [[texts(row) for row in re.findall(r'<tr.*?</tr>', table, re.S)] for table in shown]


def provenance(item: str) -> list[dict]:
    "One dict per column of a notebook's table of provenance: scale, runs, seeds, commit, date; empty if it shows no runs"
    for first, *rows in tables(item):
        facts = {r[0]: r[1:] for r in rows}
        if {'runs', 'seeds', 'commit', 'date'} <= facts.keys(): return [dict(scale=scale) | {k: v[i] for k, v in facts.items()} for i, scale in enumerate(first[1:])]
    return []


def origin(tier: dict) -> str:
    "Seeds, commit and date of a column in words"
    n = len(tier['seeds'].split(','))
    return f"{n} seed{'s'*(n > 1)}, {tier['commit']}, {tier['date']}" + (', code changed since' if tier['code changed since'] == 'yes' else '')


def verdicts(item: str) -> dict[str, Counter]:
    "Scale -> how often each verdict stands in a notebook's tables, a statement once"
    found = {}
    for first, _, *rows in (t for t in tables(item) if t and 'verdict' in t[0]):
        for i in (i for i, name in enumerate(first) if name in ('verdict', 'study verdict')):
            for row in rows:
                if m := re.fullmatch(r'(.+?) \((\w+)\)(?: · mechanism only)?', row[i]): found.setdefault(m[2], {})[row[0]] = m[1]
    return {scale: Counter(words.values()) for scale, words in found.items()}


def verdict_words(item: str, scale: str, shown: bool) -> str:
    "What a scale says about the published statements of a table or figure"
    counts = verdicts(item).get(scale, Counter())
    ran = ', '.join(f'{n} {word}' for word, n in counts.most_common() if word != 'not run')
    return (ran + f' (of {counts.total()})' if ran else '') or ('no verdict' if shown else 'not run')


def row(item: str) -> str:
    "A line of the table"
    title, claim = re.match(r'# (.+)\n\n> (.+)', ''.join(cells(item)[0]['source'])).groups()
    tiers = {p['scale'].split()[0]: p for p in provenance(item)}
    told = [verdict_words(item, s, s in tiers) + (f'<br>{origin(tiers[s])}' if s in tiers else '') for s in ('demo', 'study')]
    if not tiers: told = ['no training in it', '–']
    return f"| [{title.split(':')[0]}](papers/{item}.ipynb) | {claim.removeprefix('The paper: ')} | {' | '.join(told)} |"


def items(paper: str) -> list[str]:
    "Its tables and figures in order"
    order = ORDER[paper].split()
    return [f'{paper}/{p.stem}' for p in sorted((PAPERS/paper).glob('*.ipynb'), key=lambda p: order.index(p.stem.split('_')[0]))]


def figures() -> str:
    "The pictures with their captions"
    def one(item):
        paper, name = item.split('/')
        _, n, alt = PICTURES[item]
        tier, title = provenance(item)[n], re.match(r'# (.+)', ''.join(cells(item)[0]['source']))[1]
        return f"![{alt}](images/{name}.png)  \n*{TITLES[paper]}, [{title[0].lower() + title[1:]}](papers/{item}.ipynb): {tier['scale'].split()[0]} scale, virtual patients, {origin(tier)}.*"
    return '\n\n'.join(map(one, PICTURES))


def results() -> str:
    "The table"
    head = '| | the paper says | ours, demo scale | ours, study scale |\n|---|---|---|---|'
    return '\n'.join([head, *(line for p in ORDER for line in [f'| **{TITLES[p]}** | *{ABOUT[p]}* | | |', *map(row, items(p))])])


def bibtex() -> str:
    "This software and the three papers, as CITATION.cff has them"
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    entries = [f"@software{{medxfer_nb,\n  title = {{{cff['title']}}}, author = {{{{{cff['authors'][0]['name']}}}}}, version = {{{cff['version']}}}, url = {{{cff['repository-code']}}}\n}}"]
    for r in cff['references']:
        authors = ' and '.join(f"{a['family-names']}, {a['given-names']}" for a in r['authors'])
        more = ''.join(f', {key} = {{{value}}}' for key, value in (('pages', f"{r['start']}--{r['end']}" if 'start' in r else ''), ('doi', r.get('doi', ''))) if value)
        entries.append(f"@inproceedings{{{r['authors'][0]['family-names'].lower()}{r['year']},\n  title = {{{r['title']}}},\n  author = {{{authors}}},\n"
                       f"  booktitle = {{{r['collection-title']}}}, year = {{{r['year']}}}{more}\n}}")
    return '\n'.join(['```bibtex', *entries, '```'])


PARTS = {'pictures': figures, 'results': results, 'bibtex': bibtex}


def home(text: str) -> str:
    "The source of the home page's cells with what is made put between its marks"
    for name, make in PARTS.items():
        text = re.sub(rf'(?<=<!-- {name}: by .ci/home.py -->\n\n).*?(?=\n\n<!-- end -->)', lambda _: make(), text, flags=re.S)
    return text


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for item in PICTURES: (IMAGES/f"{item.split('/')[1]}.png").write_bytes(picture(item))
    book = json.loads(HOME.read_text(encoding='utf-8'))
    for cell in book['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = home(''.join(cell['source'])).splitlines(keepends=True)
    HOME.write_text(json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
