//! A kernel's arguments by name, and the memory that they point to, checked as a GPU checks it.

use crate::call::code;
use crate::machine::{Fault, machine};
use crate::memory;
use crate::source::{Kind, Parameter, Signature};

pub(crate) type Result<T> = std::result::Result<T, Fault>;

/// A launch.
pub(crate) struct Call<'a> {
    pub(super) signature: &'a Signature,
    pub(super) values: Vec<Vec<u8>>,
    pub(super) grid: [u32; 3],
}

/// The rounding rule of the project: halves up in magnitude, NaN stays quiet.
pub(crate) fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    match value.is_nan() {
        true => (bits >> 16) as u16 | 0x40,
        false => (bits.wrapping_add(0x8000) >> 16) as u16,
    }
}

pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// As IEEE 754 rounds: the value in units of the last place that f16 has there, to the nearest whole number.
pub(crate) fn f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    if value.is_nan() {
        return sign | 0x7e00 | (value.to_bits() >> 13) as u16 & 0x3ff;
    }
    let size = f64::from(value).abs();
    if size >= 65520.0 {
        return sign | 0x7c00;
    }
    // The exponent of the value, but not below that of the least normal one.
    let exponent = ((size.to_bits() >> 52) as i32 - 1023).max(-14);
    let units = (size * f64::from(10 - exponent).exp2()).round_ties_even() as u16;
    // A normal one has 1024 units more than its mantissa; 2048 of them are the next exponent's.
    sign | ((((exponent + 14) as u16) << 10) + units)
}

pub(crate) fn from_f16(bits: u16) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    let size = match (exponent, mantissa) {
        (31, 0.0) => f32::INFINITY,
        (31, _) => f32::NAN,
        (0, _) => mantissa * (-24.0f32).exp2(),
        _ => (1024.0 + mantissa) * ((exponent - 25) as f32).exp2(),
    };
    if bits & 0x8000 == 0 { size } else { -size }
}

fn word<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut word = [0; N];
    word.copy_from_slice(&bytes[..N]);
    word
}

impl Call<'_> {
    /// Blocks along the first axis.
    pub(super) fn blocks(&self) -> usize {
        self.grid[0] as usize
    }

    fn parameter(&self, name: &str) -> Result<(&Parameter, &[u8])> {
        let all = &self.signature.parameters;
        match all.iter().position(|p| p.name == name) {
            Some(index) => Ok((&all[index], &self.values[index])),
            None => Err(self.fault(code::INVALID_VALUE, &format!("has no parameter '{name}'"))),
        }
    }

    /// A whole number.
    pub(super) fn number(&self, name: &str) -> Result<usize> {
        let (parameter, bytes) = self.parameter(name)?;
        match (parameter.pointer, parameter.kind) {
            (false, Kind::U32) => Ok(u32::from_le_bytes(word(bytes)) as usize),
            (false, Kind::U64) => Ok(u64::from_le_bytes(word(bytes)) as usize),
            _ => Err(self.fault(code::INVALID_VALUE, &format!("'{name}' is no number"))),
        }
    }

    /// A number with a fraction.
    pub(super) fn real(&self, name: &str) -> Result<f64> {
        let (parameter, bytes) = self.parameter(name)?;
        match (parameter.pointer, parameter.kind) {
            (false, Kind::F32) => Ok(f64::from(f32::from_le_bytes(word(bytes)))),
            (false, Kind::F64) => Ok(f64::from_le_bytes(word(bytes))),
            _ => Err(self.fault(code::INVALID_VALUE, &format!("'{name}' has no fraction"))),
        }
    }

    /// The bytes of a field of a struct.
    fn field(&self, name: &str, field: &str) -> Result<[u8; 4]> {
        let (parameter, bytes) = self.parameter(name)?;
        match parameter.fields.iter().find(|(known, ..)| known == field) {
            Some((_, _, at)) => Ok(word(&bytes[*at..])),
            None => Err(self.fault(code::INVALID_VALUE, &format!("'{name}' has no '{field}'"))),
        }
    }

    pub(super) fn field_number(&self, name: &str, field: &str) -> Result<usize> {
        Ok(u32::from_le_bytes(self.field(name, field)?) as usize)
    }

    pub(super) fn field_real(&self, name: &str, field: &str) -> Result<f32> {
        Ok(f32::from_le_bytes(self.field(name, field)?))
    }

    /// The place of an element, once all `n` from it are known to be there.
    fn place(&self, name: &str, first: usize, n: usize) -> Result<(u64, Kind)> {
        let (parameter, bytes) = self.parameter(name)?;
        if !parameter.pointer {
            return Err(self.fault(code::INVALID_VALUE, &format!("'{name}' is no pointer")));
        }
        let size = parameter.kind.bytes() as u64;
        let address = u64::from_le_bytes(word(bytes)) + first as u64 * size;
        let there = machine()
            .lock()
            .memory
            .reachable(address, (n as u64 * size).max(1));
        match there {
            _ if n == 0 => Ok((address, parameter.kind)),
            true => Ok((address, parameter.kind)),
            false => {
                let what = format!("'{name}' touches {n} elements at {address:#x}");
                Err(self.fault(code::ILLEGAL_ADDRESS, &what))
            }
        }
    }

    /// Elements in f32, whatever they are stored as.
    pub(super) fn floats(&self, name: &str, first: usize, n: usize) -> Result<Vec<f32>> {
        let (address, kind) = self.place(name, first, n)?;
        if memory::is_mapped(address) {
            machine().lock().note("host memory read by a kernel");
        }
        let bytes = memory::read(address, (n * kind.bytes()) as u64);
        let (words, halves) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<2>().0);
        match kind {
            Kind::F32 => Ok(words.iter().map(|c| f32::from_le_bytes(*c)).collect()),
            Kind::F16 => {
                let halves = halves.iter().map(|c| from_f16(u16::from_le_bytes(*c)));
                Ok(halves.collect())
            }
            Kind::Bf16 | Kind::U16 => {
                let halves = halves.iter().map(|c| from_bf16(u16::from_le_bytes(*c)));
                Ok(halves.collect())
            }
            _ => Err(self.fault(code::INVALID_VALUE, &format!("'{name}' holds no floats"))),
        }
    }

    /// As [`Call::place`], to be written: on the device, for the host's memory is written by copies.
    fn own_place(&self, name: &str, first: usize, n: usize) -> Result<(u64, Kind)> {
        let (address, kind) = self.place(name, first, n)?;
        if memory::is_mapped(address) {
            let what = format!("'{name}' writes the host's memory");
            return Err(self.fault(code::ILLEGAL_ADDRESS, &what));
        }
        Ok((address, kind))
    }

    /// Stores elements, rounded to what they are stored as.
    pub(super) fn put(&self, name: &str, first: usize, values: &[f32]) -> Result<()> {
        let (address, kind) = self.own_place(name, first, values.len())?;
        let bytes: Vec<u8> = match kind {
            Kind::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Kind::F16 => values.iter().flat_map(|v| f16(*v).to_le_bytes()).collect(),
            Kind::Bf16 | Kind::U16 => values.iter().flat_map(|v| bf16(*v).to_le_bytes()).collect(),
            Kind::F64 => values
                .iter()
                .flat_map(|v| f64::from(*v).to_le_bytes())
                .collect(),
            _ => return Err(self.fault(code::INVALID_VALUE, &format!("'{name}' holds no floats"))),
        };
        memory::write(address, &bytes);
        Ok(())
    }

    /// Stores sums, which may go to the host's memory.
    pub(super) fn put_doubles(&self, name: &str, values: &[f64]) -> Result<()> {
        let (address, _) = self.place(name, 0, values.len())?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        memory::write(address, &bytes);
        Ok(())
    }

    /// Whether a pointer points to something.
    pub(super) fn given(&self, name: &str) -> Result<bool> {
        let (_, bytes) = self.parameter(name)?;
        Ok(u64::from_le_bytes(word(bytes)) != 0)
    }

    /// Elements of two bytes, as they are.
    pub(super) fn halves(&self, name: &str, n: usize) -> Result<Vec<u16>> {
        let (address, _) = self.place(name, 0, n)?;
        let bytes = memory::read(address, 2 * n as u64);
        let halves = bytes.as_chunks::<2>().0.iter();
        Ok(halves.map(|c| u16::from_le_bytes(*c)).collect())
    }

    pub(super) fn put_halves(&self, name: &str, values: &[u16]) -> Result<()> {
        let (address, _) = self.own_place(name, 0, values.len())?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        memory::write(address, &bytes);
        Ok(())
    }

    /// Sums, which may be in the host's memory.
    pub(super) fn doubles(&self, name: &str, n: usize) -> Result<Vec<f64>> {
        let (address, _) = self.place(name, 0, n)?;
        let bytes = memory::read(address, 8 * n as u64);
        let doubles = bytes.as_chunks::<8>().0.iter();
        Ok(doubles.map(|c| f64::from_le_bytes(*c)).collect())
    }

    pub(super) fn words(&self, name: &str, n: usize) -> Result<Vec<u32>> {
        let (address, _) = self.place(name, 0, n)?;
        let bytes = memory::read(address, 4 * n as u64);
        let words = bytes.as_chunks::<4>().0.iter();
        Ok(words.map(|c| u32::from_le_bytes(*c)).collect())
    }

    pub(super) fn put_words(&self, name: &str, values: &[u32]) -> Result<()> {
        // A word of the host's memory says that the input was bad.
        let (address, _) = match name {
            "fault" => self.place(name, 0, values.len())?,
            _ => self.own_place(name, 0, values.len())?,
        };
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        memory::write(address, &bytes);
        Ok(())
    }
}
