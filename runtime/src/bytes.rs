//! Sizes as people write them: `512MiB`, `8GB`, `1.5GiB`, `4096`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, read from and printed for people.
///
/// `KB`, `MB`, `GB`, `TB` are powers of 1000; `KiB`, `MiB`, `GiB`, `TiB` (and the bare letters
/// `K`, `M`, `G`, `T`) powers of 1024.
///
/// ```
/// use forebay::Bytes;
/// assert_eq!("1.5MiB".parse::<Bytes>()?, Bytes(1_572_864));
/// assert_eq!("8GB".parse::<Bytes>()?, Bytes(8_000_000_000));
/// assert_eq!(Bytes(1_572_864).to_string(), "1.5 MiB");
/// # Ok::<(), forebay::BytesError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// Why a size could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a size: write a number and a unit, as in 512MiB, 8GB or 1.5GiB")]
pub struct BytesError {
    text: String,
}

const UNITS: [(&str, u64); 14] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
];

impl FromStr for Bytes {
    type Err = BytesError;

    fn from_str(text: &str) -> Result<Self, BytesError> {
        let error = || BytesError {
            text: text.to_owned(),
        };
        let trimmed = text.trim();
        let split = trimmed
            .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_'))
            .unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let scale = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(error)?
            .1;
        let number = number.replace('_', "");
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(Bytes).ok_or_else(error);
        }
        let fraction: f64 = number.parse().map_err(|_| error())?;
        let bytes = fraction * scale as f64;
        // 2^63 is far above any memory and exactly representable.
        if bytes.is_finite() && bytes < 9.2e18 {
            Ok(Bytes(bytes as u64))
        } else {
            Err(error())
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, scale) = match self.0 {
            n if n >= 1 << 40 => ("TiB", 1u64 << 40),
            n if n >= 1 << 30 => ("GiB", 1 << 30),
            n if n >= 1 << 20 => ("MiB", 1 << 20),
            n if n >= 1 << 10 => ("KiB", 1 << 10),
            n => return write!(f, "{n} B"),
        };
        let value = self.0 as f64 / scale as f64;
        if value >= 100.0 {
            write!(f, "{value:.0} {unit}")
        } else {
            let text = format!("{value:.2}");
            write!(
                f,
                "{} {unit}",
                text.trim_end_matches('0').trim_end_matches('.')
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_in_both_systems_of_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("8GB", 8_000_000_000),
            ("0.5 g", 1 << 29),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in [
            "",
            "abc",
            "12XB",
            "-5MiB",
            "99999999999999TiB",
            "1.2.3GB",
            "1e400",
        ] {
            let error = text.parse::<Bytes>().expect_err(text);
            assert!(error.to_string().contains("512MiB"), "{error}");
        }
    }
}
