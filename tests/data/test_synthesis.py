"""The synthetic corpus: reproducible, fully labelled, and acoustically what its labels say."""

import numpy as np
import pytest

from layerwise.config import resolve
from layerwise.data.open import open_demo
from layerwise.data.synthesis import (
    BANDWIDTHS,
    INVENTORY,
    PHONES,
    RATE,
    VOWELS,
    Utterance,
    Voice,
    draw_f0,
    draw_voice,
    frame_count,
    frame_spectra,
    glottal_pulses,
    overlap_add,
    speak,
    synthesise_corpus,
)
from layerwise.training.samples import TEST, split_samples

SPEAKERS, UTTERANCES = 4, 6


@pytest.fixture(scope="module")
def corpus() -> list[Utterance]:
    return synthesise_corpus(SPEAKERS, UTTERANCES, seconds=1.5, seed=0)


def segments(utterance: Utterance, phones: tuple[str, ...]) -> list[np.ndarray]:
    """The samples of every occurrence of `phones`."""
    pieces = np.split(utterance.samples.astype(np.float64), utterance.phone_stops[:-1])
    return [piece for piece, phone in zip(pieces, utterance.phones, strict=True) if phone in phones]


def neutral_voice(size: float = 1.0) -> Voice:
    return Voice(
        np.full(len(BANDWIDTHS), size), bandwidth_scale=0.5, f0=50.0, open_quotient=0.5, tilt=0.0, breathiness=0.0
    )


def hold(phone: str, voice: Voice, f0: float = 50.0, seconds: float = 0.5) -> np.ndarray:
    """One long phone, without channel and noise."""
    length = round(seconds * RATE)
    pitch = np.full(frame_count(length), f0)
    return overlap_add(speak(np.random.default_rng(0), voice, (phone,), np.array([length]), pitch), length)


def periodicity(signal: np.ndarray, lowest: float = 60, highest: float = 350) -> tuple[float, float]:
    """The pitch in Hz, by autocorrelation, and the autocorrelation there relative to lag 0."""
    signal = signal - signal.mean()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(signal, 2 * len(signal))) ** 2)[: len(signal)]
    shortest, longest = int(RATE / highest), int(RATE / lowest)
    lag = shortest + int(np.argmax(correlation[shortest : longest + 1]))
    return RATE / lag, float(correlation[lag] / correlation[0])


def spectral_peak(signal: np.ndarray, low: float, high: float) -> float:
    """The strongest frequency between `low` and `high`, in Hz."""
    hertz = np.fft.rfftfreq(len(signal), 1 / RATE)
    band = (hertz >= low) & (hertz <= high)
    power = np.abs(np.fft.rfft(signal * np.hanning(len(signal))))
    return float(hertz[band][np.argmax(power[band])])


def test_the_same_seed_gives_the_same_bits(corpus: list[Utterance]) -> None:
    for first, second in zip(corpus, synthesise_corpus(SPEAKERS, UTTERANCES, seconds=1.5, seed=0), strict=True):
        assert (first.name, first.speaker, first.phones) == (second.name, second.speaker, second.phones)
        np.testing.assert_array_equal(first.samples, second.samples)
        np.testing.assert_array_equal(first.phone_stops, second.phone_stops)


def test_another_seed_gives_another_corpus(corpus: list[Utterance]) -> None:
    other = synthesise_corpus(1, 1, seconds=1.5, seed=1)[0]
    assert other.name == corpus[0].name
    assert other.phones != corpus[0].phones


def test_an_utterance_does_not_depend_on_how_many_others_there_are(corpus: list[Utterance]) -> None:
    by_name = {utterance.name: utterance for utterance in corpus}
    for utterance in synthesise_corpus(2, 3, seconds=1.5, seed=0):
        np.testing.assert_array_equal(utterance.samples, by_name[utterance.name].samples)


def test_every_speaker_has_its_utterances_and_every_name_is_unique(corpus: list[Utterance]) -> None:
    assert len({utterance.name for utterance in corpus}) == len(corpus) == SPEAKERS * UTTERANCES
    expected = [f"speaker{speaker:02d}" for speaker in range(SPEAKERS) for _ in range(UTTERANCES)]
    assert [utterance.speaker for utterance in corpus] == expected


def test_phone_labels_cover_every_sample(corpus: list[Utterance]) -> None:
    for utterance in corpus:
        assert utterance.phone_stops.dtype == np.int64
        assert len(utterance.phones) == len(utterance.phone_stops)
        assert np.all(np.diff(utterance.phone_stops, prepend=0) > 0)
        assert utterance.phone_stops[-1] == len(utterance.samples)
        assert utterance.phones[0] == utterance.phones[-1] == "sil"


def test_every_phone_occurs_and_no_other(corpus: list[Utterance]) -> None:
    assert {phone for utterance in corpus for phone in utterance.phones} == set(PHONES)


def test_samples_are_finite_float32_below_one_at_many_levels(corpus: list[Utterance]) -> None:
    peaks = np.array([np.abs(utterance.samples).max() for utterance in corpus])
    assert all(utterance.samples.dtype == np.float32 for utterance in corpus)
    assert np.all(np.isfinite(peaks)) and peaks.max() < 1
    assert peaks.max() > 1.5 * peaks.min()


def test_a_very_short_utterance_still_has_a_vowel() -> None:
    utterance = synthesise_corpus(1, 1, seconds=0.01)[0]
    assert set(utterance.phones) & set(VOWELS)


@pytest.mark.parametrize("size", [1.0, 1.15])
@pytest.mark.parametrize("vowel", VOWELS)
def test_the_formants_of_a_held_vowel_are_where_the_table_says_times_the_tract_size(vowel: str, size: float) -> None:
    f1, f2, f3 = size * np.array(INVENTORY[vowel].formants)
    sound = hold(vowel, neutral_voice(size))
    # Harmonics lie 50 Hz apart, so a peak is within 25 Hz; the slopes of the neighbouring formants add a little.
    assert spectral_peak(sound, 150, (f1 + f2) / 2) == pytest.approx(f1, abs=50)
    brightened = np.diff(sound, n=2)  # lifts F2 above the skirt of F1
    assert spectral_peak(brightened, 0.4 * f1 + 0.6 * f2, (f2 + f3) / 2) == pytest.approx(f2, abs=60)


def test_a_held_vowel_has_the_pitch_that_was_asked_for() -> None:
    assert periodicity(hold("ax", neutral_voice(), f0=125.0))[0] == pytest.approx(125.0, rel=0.02)


def test_glottal_pulses_carry_no_constant_flow() -> None:
    pulses = glottal_pulses(np.full(RATE, 100.0), open_quotient=0.6)
    assert abs(pulses.mean()) < 0.02
    assert pulses.min() == pytest.approx(-1, abs=0.1)


def test_a_stop_is_silent_until_its_burst() -> None:
    length = RATE // 2
    sound = hold("t", neutral_voice(), seconds=0.5)
    closure, burst = sound[: int(0.55 * length)], sound[int(0.65 * length) :]
    assert np.abs(closure).max() < 1e-3 * np.abs(burst).max()


def test_vowels_are_periodic_and_fricatives_are_not(corpus: list[Utterance]) -> None:
    def strengths(phones: tuple[str, ...]) -> list[float]:
        return [
            periodicity(part)[1] for utterance in corpus for part in segments(utterance, phones) if len(part) > 1200
        ]

    assert np.median(strengths(("iy", "eh", "aa", "ao", "uw"))) > 0.5
    assert np.median(strengths(("s", "sh"))) < 0.4


def test_labels_line_up_with_the_sound(corpus: list[Utterance]) -> None:
    for utterance in corpus:
        silence = np.concatenate(segments(utterance, ("sil",)))
        vowels = np.concatenate(segments(utterance, VOWELS))
        assert vowels.std() > 1.4 * silence.std()


def test_pitch_stays_in_the_human_range_and_speakers_overlap() -> None:
    ranges = []
    for speaker in range(10):
        rng = np.random.default_rng((0, speaker))
        voice = draw_voice(rng, speaker)
        contours = np.concatenate([draw_f0(rng, voice.f0, 150) for _ in range(20)])
        assert contours.min() > 50 and contours.max() < 400
        ranges.append((contours.min(), contours.max()))
    lows, highs = np.array(ranges).T
    assert lows.max() < highs.min()


def test_speakers_differ_in_their_vocal_tracts() -> None:
    voices = [draw_voice(np.random.default_rng((0, speaker)), speaker) for speaker in range(10)]
    sizes = np.sort([voice.formant_scale.mean() for voice in voices])
    assert sizes[-1] / sizes[0] > 1.2
    assert np.diff(sizes).max() < 0.1  # spread out, not two clusters


def test_overlap_add_inverts_frame_spectra() -> None:
    signal = np.random.default_rng(0).normal(size=1001)
    np.testing.assert_allclose(overlap_add(frame_spectra(signal), len(signal)), signal, atol=1e-12)


@pytest.mark.usefixtures("small_demo")
def test_every_speaker_of_the_demo_is_trained_on_and_tested_and_the_seed_changes_nothing_of_it() -> None:
    data = open_demo()
    for seed in range(2):
        split = split_samples(data, resolve("demo", overrides={"training.seed": seed}))
        np.testing.assert_array_equal(split == TEST, data.test)
    for speaker in np.unique(data.labels["speaker"]):
        assert set((split == TEST)[data.labels["speaker"] == speaker]) == {False, True}
