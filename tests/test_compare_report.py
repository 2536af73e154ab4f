"The report of a comparison: the answer first, nothing from elsewhere, no names, and tables from which the numbers follow."
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from compare_fakes import fake_results
from medxfer_nb.compare import report
from medxfer_nb.compare.figures import alt_text
from medxfer_nb.compare.inspect import inspect
from medxfer_nb.compare.judge import judge
from medxfer_nb.compare.power import Parts, anova_parts, patient_values, plan_more
from medxfer_nb.compare.recommend import recommend
from medxfer_nb.compare.report import Contents, Part, Picture, Table, as_cell, comparison_notebook, page_parts, render_comparison, score_rows, score_table, write_comparison
from medxfer_nb.compare.results import load_results
from medxfer_nb.compare.table import prepare, read_table, virtual_table

matplotlib.use('Agg')
ARMS = ('scratch', 'full@a', 'linear_probe@a', 'l2sp@a')
EFFECTS = {'full@a': .06, 'linear_probe@a': -.08, 'l2sp@a': .12}


PLAN = plan_more(Parts(1e-4, 1e-2, 1e-3), .05, 40, 3)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    "Figures are drawn but not written, and one plan serves all, except where a test is about them"
    if request.node.name == 'test_one_offline_page_that_answers_first': return
    def stand_in(fig, caption='', form='svg'):
        plt.close(fig)
        return Picture('data:image/png;base64,AAAA', alt_text(fig), caption)
    monkeypatch.setattr(report, 'picture', stand_in)
    monkeypatch.setattr(report, 'plan_more', lambda *a, **k: PLAN)


def contents_of(results, **more):
    judgement = judge(results, n=200)
    return Contents(results, judgement, recommend(results, judgement), **more)


@pytest.fixture(scope='module')
def dice():
    results = fake_results('segmentation', arms=ARMS, effects=EFFECTS, seeds=5, interaction_sd=.02, left_out={'IMM': 'one source: nothing to merge'},
                           failures=['soup@a, repeat 2, fold 1: loss is NaN at step 40'], portions=(.5, 1.))
    results.titles.update({'linear_probe@a': 'Linear probe', 'scratch': 'From scratch', 'full@a': 'Full fine-tuning', 'l2sp@a': 'L2-SP'})
    return contents_of(results)


class Page(HTMLParser):
    "Addresses, tags, pictures and text of a page, whose tags must close"
    def __init__(self, page):
        super().__init__()
        self.addresses, self.tags, self.open, self.text, self.alts, self.ids = [], [], [], [], [], set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'link', 'img', 'br'): self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'data', 'action')]
        self.alts += [dict(attrs).get('alt')]*(tag == 'img')
        self.ids |= {v for k, v in attrs if k == 'id'}

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open and self.open[-1] not in ('style', 'script'): self.text.append(data)


def test_one_offline_page_that_answers_first(dice):
    before = plt.get_fignums()
    html = render_comparison(dice, virtual=True)
    page, text = Page(html), ' '.join(' '.join(Page(html).text).split())
    assert all(a.startswith(('data:', '#')) for a in page.addresses) and 'http' not in html and 'url(' not in html and '@import' not in html
    assert {a[1:] for a in page.addresses if a.startswith('#')} <= page.ids
    assert page.tags.count('script') == 1 and page.tags.count('h1') == 1 and not re.search(r'\son[a-z]+=', html)
    assert all(alt and len(alt) > 30 for alt in page.alts) and len(page.alts) >= 7
    for said in ('Use L2-SP', 'virtual patients: mechanisms, not clinical numbers', 'IMM: one source: nothing to merge', 'loss is NaN at step 40', '40 patients tested', '5 × 4 repeats × folds',
                 'Outlines and volumes', 'What this page cannot show', 'not a medical device', 'these trained networks only', 'These patients never existed'): assert said in text, said
    assert text.index('Use L2-SP') < text.index('Negative transfer') < text.index('The strategies compared') < text.index('What was done') < text.index('Provenance')
    assert '-0.0' not in text, 'a true minus sign in front of every number'
    assert len(html) < 2e6 and 'prefers-color-scheme: dark' in html and '@media print' in html
    assert plt.get_fignums() == before, 'every figure is closed'


@pytest.mark.parametrize('provenance, said', [(dict(date='2026-01-02', commit='0123456789abcdef', dirty=True), 'Last training on 2026-01-02, commit 0123456789, with uncommitted changes'),
                                              (dict(date='2026-01-02', commit=None, dirty=False), 'Last training on 2026-01-02'), ({}, None)])
def test_the_page_says_when_and_from_which_commit(dice, provenance, said):
    made = Contents(replace(dice.results, provenance=provenance), dice.judgement, dice.recommendation)
    found = re.findall('<p class="scale">([^<]*)</p></header>', render_comparison(made, parts=[]))
    assert found == [said]*bool(said)


def test_negative_transfer_is_red_and_only_where_it_is(dice):
    box = re.search(r'<div class="fault" id="negative">(.*?)</div>', render_comparison(dice), re.S)[1]
    assert 'Linear probe is worse than training from scratch by −0.0' in box and box.count('<li>') == 1
    assert 'id="negative"' not in render_comparison(contents_of(fake_results('segmentation', arms=ARMS, seeds=3)))


def test_verdicts_of_the_table_are_those_of_the_judge(dice):
    table, judged = score_table(dice), dice.judgement.table
    assert [row[0] for row in table.rows] == ['L2-SP', 'Full fine-tuning', 'From scratch', 'Linear probe']
    column = table.columns.index('against training from scratch')
    claims = judged.claim_scratch[['l2sp@a', 'full@a', 'scratch', 'linear_probe@a']].tolist()
    assert [row[column].tone for row in table.rows] == [{1: 'good', 0: 'even', -1: 'bad'}.get(c, '') for c in claims] == ['good', 'good', '', 'bad']
    assert table.rows[0][column].shown.startswith(f'{judged.difference_scratch["l2sp@a"]:+.3f} [')
    assert [row[column].key for row in table.rows] == sorted((row[column].key for row in table.rows), reverse=True)


def changed(results, arm, **scores):
    return replace(results, scores=results.scores | {arm: results.scores[arm] | scores})


def test_who_finds_nothing_does_not_shine_by_distances(dice):
    r = dice.results
    hd95 = np.where(r.patients < 10, np.nan, 1.) + 0*r.scores['linear_probe@a']['hd95']
    made = contents_of(changed(r, 'linear_probe@a', hd95=hd95))
    table = score_table(made)
    cells = {row[0]: row[table.columns.index('HD95, mm')].shown for row in table.rows}
    assert cells['Linear probe'] == '1.0 (25% of cases undefined)' and 'undefined' not in cells['L2-SP']
    lost = np.full_like(hd95, np.nan)
    cell = score_table(contents_of(changed(r, 'linear_probe@a', hd95=lost))).rows[-1][table.columns.index('HD95, mm')]
    assert cell.shown == '– (100% of cases undefined)' and cell.key == ''


def test_images_without_a_spacing(dice):
    r = dice.results
    for arm in r.arms: r = changed(r, arm, ml=np.full(r.folds.shape, np.nan), predicted_ml=np.full(r.folds.shape, np.nan))
    made = contents_of(r)
    text = ' '.join(Page(render_comparison(made)).text)
    assert 'HD95, pixels' in score_table(made).columns and 'pixels of the surface' in text and 'no volumes' in text and 'mm of the' not in text
    assert not any('bland_altman' in c.source for c in comparison_notebook(made).cells)


def test_one_repeat_plans_and_claims_nothing():
    made = contents_of(fake_results('segmentation', arms=ARMS, effects=EFFECTS, seeds=1))
    text = ' '.join(' '.join(Page(render_comparison(made)).text).split())
    assert 'One repeat: nothing is claimed' in text and 'chance to find it now' not in text and 'the plan below' not in text
    assert [c.shown for c in report._pairs(made).rows[0][3:]][::2] == ['–', '–']


def test_the_mixed_model_is_on_the_page(dice):
    "A fit of statsmodels per pair agrees with the closed form of a balanced study."
    j, choice = dice.judgement, dice.recommendation.choice
    table = report._mixed(dice)
    assert len(table.rows) >= 2 and table.caption in render_comparison(dice) and report._mixed(contents_of(fake_results('segmentation', arms=ARMS, seeds=1))) is None
    others = [a for a in dict.fromkeys((*j.references.values(), dice.rival)) if a and a != choice]
    for other, row in zip(others, table.rows):
        closed = anova_parts(patient_values(dice.results, choice) - patient_values(dice.results, other))
        np.testing.assert_allclose([c.key for c in row[1:4]], [closed.seed, closed.patient, closed.rest], rtol=.05, atol=1e-6)


def test_the_notebook_judges_at_the_level_of_the_page(dice):
    made = Contents(dice.results, judge(dice.results, level=.9), dice.recommendation)
    assert 'level: float = 0.9 ' in comparison_notebook(made).cells[1].source


def test_null_and_tie_recommend_nothing_on_the_page():
    text = ' '.join(Page(render_comparison(contents_of(fake_results(arms=ARMS, n_patients=40, seeds=2)))).text)
    assert 'No difference between the 4 strategies can be claimed' in text and 'Can the probabilities be trusted?' in text


def test_what_is_written_into_titles_and_labels_stays_text():
    results = fake_results('segmentation', arms=('scratch', 'full@a'), seeds=2, labels=('<b>tumour</b>',), left_out={'<script>alert(1)</script>': '"quoted" & <i>'})
    results.titles['full@a'] = '<img src=x onerror=alert(1)>'
    page = Page(render_comparison(contents_of(results)))
    assert page.tags.count('script') == 1 and 'i' not in page.tags and all(a.startswith(('data:', '#')) for a in page.addresses)
    assert any('<script>alert(1)</script>' in t for t in page.text)


def test_no_name_leaves_the_table(tmp_path):
    "Real table, inspection and pool with names in every column: none on the page, in the tables or in the saved results"
    virtual_table(tmp_path/'data', 'classification', n=24, size=32, labels=('Any finding',), progress=lambda *_: None)
    frame = pd.read_csv(tmp_path/'data'/'cases.csv')
    frame['patient'] = [f'Mustermann-{i}' for i in range(len(frame))]
    (tmp_path/'data'/'Mustermann').mkdir()
    for i, path in enumerate(frame.path): (tmp_path/'data'/path).rename(tmp_path/'data'/'Mustermann'/f'{i}.png')
    frame['path'] = [f'Mustermann/{i}.png' for i in range(len(frame))]
    label = [c for c in frame if c not in ('path', 'patient', 'study', 'split', 'weight')]
    frame[label[0]] = [i % 2 for i in range(len(frame))]
    table = read_table(frame[['path', 'patient', label[0]]], root=tmp_path/'data')
    pool = prepare(table, tmp_path/'pool', size=32, progress=lambda *_: None)
    results = fake_results(arms=ARMS, n_patients=24, seeds=2)
    found = inspect(table, progress=lambda *_: None)
    page = write_comparison(results, tmp_path/'out', judge(results, n=200), inspection=found, pool=pool, notebook=False)
    assert 'Where it fails' in page.read_text()
    written = [p for p in (tmp_path/'out').rglob('*') if p.is_file()]
    assert len(written) >= 8 and not [p for p in written if b'Mustermann' in p.read_bytes()]
    assert all(f.what in ' '.join(Page(page.read_text()).text) for f in found.errors + found.warnings)


def test_inspection_and_design_are_told(dice):
    found = SimpleNamespace(table=pd.DataFrame([dict(level='warning', check='near', what='two images are nearly the same', rows='4, 17', remedy='keep one of them')]))
    design = SimpleNamespace(describe=lambda: 'four arms\nleft out: portions')
    contents = Contents(dice.results, dice.judgement, dice.recommendation, found, design)
    assert report.inspection_part(dice) is None
    text = ' '.join(Page(render_comparison(contents)).text)
    assert 'two images are nearly the same' in text and '4, 17' in text and 'left out: portions' in text


def test_scores_csv_is_enough_to_find_the_auc_again(tmp_path):
    results = fake_results(arms=ARMS, effects=EFFECTS, n_patients=40, seeds=2, cases_per_patient=2)
    write_comparison(results, tmp_path, judge(results, n=200), notebook=False)
    scores, arms = pd.read_csv(tmp_path/'scores.csv'), pd.read_csv(tmp_path/'arms.csv', index_col=0)
    truth = results.targets[:, 0]
    for arm, mine in scores.groupby('arm'):
        repeats = []
        for _, repeat in mine.groupby('repeat'):
            folds = [(truth[f.row - 2], f.probability_finding) for _, f in repeat.groupby('fold')]
            pairs = [(y == 1).sum()*(y == 0).sum() for y, _ in folds]
            repeats.append(np.average([roc_auc_score(y, p) if n else 0 for (y, p), n in zip(folds, pairs)], weights=pairs))
        np.testing.assert_allclose(np.mean(repeats), arms['mean'][arm], atol=2e-5) # six digits are written
    assert sorted(set(scores.patient)) == list(range(1, 41)) and scores.row.min() == 2
    assert {p.name for p in tmp_path.iterdir()} == {'report.html', 'results', 'scores.csv', 'arms.csv', 'pairs.csv', 'costs.csv'}


def test_cases_that_were_never_tested_have_no_row():
    results = fake_results('segmentation', seeds=2, folds=1)
    results.folds[:, :10] = -1
    rows = score_rows(results)
    assert rows.row.min() == 12 and len(rows) == 3*2*30 and {'dice', 'hd95', 'ml', 'predicted_ml', 'dice_lesion'} <= set(rows)
    judged = contents_of(fake_results('segmentation', seeds=2, folds=1))
    assert 'The table itself says which patients are for testing' in ' '.join(Page(render_comparison(judged)).text)


@pytest.mark.parametrize('kind', [dict(arms=('scratch',)), dict(task='segmentation', arms=('full@a',), seeds=2), dict(arms=('l2sp@a', 'timm@a+b'), seeds=2, portions=(.5, 1.)),
                                  dict(labels=('a', 'b', 'c'), exclusive=True, n_patients=60, seeds=2), dict(task='segmentation', seeds=1, cases_per_patient=2)])
def test_small_and_odd_studies_have_a_page_too(kind):
    contents = contents_of(fake_results(**kind))
    assert all(isinstance(p, Part) for p in page_parts(contents)) and Page(render_comparison(contents))
    nbformat.validate(comparison_notebook(contents))


def test_the_executed_notebook_shows_the_same_numbers(tmp_path):
    results = fake_results('segmentation', arms=('scratch', 'full@a'), effects={'full@a': .1}, seeds=3)
    judgement = judge(results, correction='holm')
    write_comparison(results, tmp_path, judgement, progress=lambda line: pytest.fail(line))
    cells = nbformat.read(tmp_path/'comparison.ipynb', 4).cells
    outputs = [o for c in cells for o in c.get('outputs', [])]
    shown = json.dumps(outputs)
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 5 and not [o for o in outputs if o.output_type == 'error']
    assert f'{judgement.table.difference_scratch["full@a"]:.3f}' in shown and recommend(results, judgement).headline in shown
    assert str(tmp_path) not in (tmp_path/'comparison.ipynb').read_text() and str(tmp_path) not in (tmp_path/'comparison.provenance.json').read_text()
    again = load_results(tmp_path/'results')
    np.testing.assert_array_equal(again.scores['full@a']['dice'], results.scores['full@a']['dice'])


def test_a_notebook_that_fails_does_not_lose_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(report, 'run_notebooks', lambda *a, **k: [SimpleNamespace(error='cell 3: no kernel', output=None)])
    told = []
    page = write_comparison(fake_results('segmentation', seeds=2), tmp_path, progress=told.append)
    assert page.exists() and told == ['comparison.ipynb could not be executed: cell 3: no kernel']


def test_cells_sort_by_value_and_not_by_text():
    assert [as_cell(v).key for v in (1234, .5, 'b', None, True)] == [1234, .5, 'b', '', 1]
    assert [as_cell(v).shown for v in (1234, -.25, float('nan'))] == ['1,234', '−0.25', '–']
    assert Table(['a'], [[1]]).kind == 'table'


def test_no_p_value_is_zero(dice):
    text = ' '.join(Page(render_comparison(dice)).text)
    assert '<0.001' in text and ' 0.000 ' not in text and 'DeLong' not in text, 'a segmentation has no DeLong test'
    assert [report._p(v).shown for v in (.00001, .0012, float('nan'))] == ['<0.001', '0.001', '–']
