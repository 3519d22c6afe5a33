"""Files of sound, read by soundfile and resampled by soxr."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quantcli.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy as np

#: What sound folders are searched for; libsndfile, which soundfile brings, reads them all.
SOUND_SUFFIXES = (".flac", ".mp3", ".ogg", ".wav")
#: Seconds of a sound at the most: what Whisper hears at a time, and about as much as memory allows others.
LONGEST_SECONDS = 30
#: Samples per second at the most. No recording has more than 768,000; a header that says so is damaged, and seconds of
#: it would take any memory.
_HIGHEST_RATE = 1_000_000


def read_sound(file: Path | IO[bytes], rate: int) -> tuple[np.ndarray, float]:
    """A sound float32 ``[samples]`` at ``rate`` per second, its channels' mean; and the seconds that all of it lasts.

    No more than `LONGEST_SECONDS` of it are read.

    Raises:
        ValueError: it cannot be decoded, is empty, or holds what is no number.
        OSError: it cannot be read.
        MissingExtraError: soundfile or soxr is not installed.
    """
    import numpy as np

    soundfile = _soundfile()
    try:
        with soundfile.SoundFile(file) as opened:
            own_rate, seconds = opened.samplerate, opened.frames / opened.samplerate
            if own_rate > _HIGHEST_RATE:
                raise ValueError(f"it claims {own_rate:,} samples per second")
            # Where the format cannot be searched, soundfile makes room for all that is asked for.
            frames = min(opened.frames, LONGEST_SECONDS * own_rate)
            channels = opened.read(frames=frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string.rstrip(".")) from error
    sound = channels.mean(1)
    if not len(sound):
        raise ValueError("it holds no sound")
    if not np.isfinite(sound).all():
        raise ValueError("it holds values that are NaN or infinite")
    return (sound if own_rate == rate else _resampled(sound, own_rate, rate)), seconds


def _resampled(sound: np.ndarray, own_rate: int, rate: int) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("soxr", "audio", f"Resampling sound from {own_rate} to {rate} Hz") from error
    found: np.ndarray = soxr.resample(sound, own_rate, rate)
    return found


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the library that it binds is missing
        raise MissingExtraError("soundfile", "audio", "Reading sound") from error
    return soundfile
