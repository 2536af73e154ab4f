"The published numbers against an independent transcription, and the verdicts against their rules."
import itertools
from pathlib import Path

import pandas as pd
import pytest

from medxfer_nb.evaluate.stats import paired_t_range
from medxfer_nb.repro.targets import CONTRADICTIONS, TABLES, published, target, verdict

FACTS = Path(__file__).parents[2] / 'shared' / 'facts'


@pytest.mark.skipif(not FACTS.is_dir(), reason='no second transcription at hand')
@pytest.mark.parametrize('table', TABLES)
def test_every_number_is_transcribed(table):
    pd.testing.assert_frame_equal(published(table), pd.read_csv(FACTS / f'{table}.csv'))


def test_published_tables_cannot_be_changed_by_their_readers():
    mine = published('timm')
    mine['value'] = 0
    assert target('timm', portion='100%', method='timm').value == .82


def test_p_values_quote_the_tables():
    "The two AUCs that each p-value of the colorization paper compares stand in its tables, too"
    auc = set(published('colorization').value)
    p = published('colorization_p_values')
    assert set(p.a.dropna()) | set(p.b.dropna()) <= auc


def test_impossible_p_values_are_listed_and_no_others():
    rows, n_impossible = published('colorization'), 0
    printed = {r.value: r.sd for r in rows.itertuples()}
    for r in published('colorization_p_values').dropna(subset=['b']).itertuples():
        spreads = [sorted({x.sd for x in rows[rows.value == v].itertuples() if x.sd == x.sd}) for v in (r.a, r.b)]
        smallest = min(paired_t_range(r.a, sa, r.b, sb, n=3)[0] for sa, sb in itertools.product(*spreads))
        n_impossible += r.p_value < smallest
    assert n_impossible == sum('no paired t-test' in c.against for c in CONTRADICTIONS) == 2


@pytest.mark.parametrize('ours, word', [(78.4, 'reproduced'), (77.9, 'reproduced'), (77.89, 'within tolerance'), (77.4, 'within tolerance'), (77.39, 'deviates'),
                                        (None, 'not run'), (float('nan'), 'not run')])
def test_paper_scale_compares_numbers(ours, word):
    baseline = target('colorization', backbone='resnet18', strategy='baseline', dataset='CheXpert')
    assert verdict('', ours, baseline, 'paper').verdict == word


def test_a_printed_digit_is_the_spread_where_none_is_printed():
    dice = target('timm', portion='4%', method='timm')
    assert [verdict('', d, dice, 'paper', tolerance=.02).verdict for d in (.584, .59, .61)] == ['reproduced', 'within tolerance', 'deviates']


@pytest.mark.parametrize('scale', ['demo', 'study'])
def test_virtual_patients_only_decide_a_direction(scale):
    better, worse = (target('colorization', item='transfer', dataset='ChestX-ray14', strategy=s) for s in ('all(T:CheXpert E:CheXpert)', 'baseline_all'))
    for effect, sign in [(better - worse, 1), (worse - better, -1)]:
        for interval, word in [((.1, 9), 'same direction'), ((-9, -.1), 'opposite'), ((-.1, 9), 'undecided'), ((0, 0), 'undecided')]:
            mine = tuple(sorted(sign * i for i in interval))
            claim = verdict('', sum(mine) / 2, effect, scale, interval=mine, same_anatomy=True)
            assert claim.words == f'{word} ({scale}) · mechanism only'
    assert verdict('', None, effect, scale, same_anatomy=True).words == f'not run ({scale})'


@pytest.mark.parametrize('scale', ['demo', 'study', 'paper'])
def test_effects_are_judged_by_direction_at_every_scale(scale):
    a, b = (target('colorization', item='transfer', dataset='ChestX-ray14', strategy=s) for s in ('baseline_all', 'all(T:CheXpert E:ImageNet)'))
    effect = a - b # +0.5: an effect of -0.3 is nearer than one point
    words = [verdict('', sum(i) / 2, effect, scale, interval=i).verdict for i in [(-.5, -.1), (.1, .9), (-.1, 1.1), (2, 9)]]
    assert words == ['opposite', 'same direction', 'undecided', 'same direction']
    with pytest.raises(ValueError, match='confidence interval'): verdict('', .5, effect, scale)


@pytest.mark.parametrize('scale', ['demo', 'study', 'paper'])
def test_no_difference_is_a_statement_too(scale):
    coloru, pixelshuffle = (target('colorization', backbone='densenet121', strategy='color_module', module=m) for m in ('coloru', 'pixelshuffle'))
    def word(*interval): return verdict('', 0., coloru - pixelshuffle, scale, interval=interval, no_difference=True).verdict
    assert word(-1, 2) == word(-.1, 0) == 'no difference shown, as published'
    assert word(.1, 2) == word(-2, -.1) == 'differs: the paper found no difference'
    assert word(-float('inf'), float('inf')) == 'undecided'
    assert verdict('', None, coloru - pixelshuffle, scale, no_difference=True).verdict == 'not run'
