//! How states are kept in memory and on disk.

use std::ops::Range;

use half::bf16;

use crate::cpu::adam::States;

/// How the fp32 master is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Master {
    /// As it is.
    #[default]
    F32,
    /// As what the bf16 parameter is short of it: a signed 16-bit number, `master = (parameter << 16) + rest` in bits.
    /// Since parameters are rounded half up, that loses nothing, and a parameter is stored once.
    Split,
}

/// The type of moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moment {
    /// Single precision.
    #[default]
    F32,
    /// bfloat16, rounded after each step: half the bytes, and other numbers than single precision gives.
    Bf16,
}

impl Moment {
    /// The slowest decay of a moment that bf16 can follow: what a step takes from it must be more than half of the
    /// distance between neighbours, 2^-8 of the value.
    pub const SLOWEST_IN_BF16: f64 = 1.0 - 1.0 / 256.0;

    /// Bytes of one.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl std::str::FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fp32" | "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!(
                "'{text}' is not a type of moments: use fp32 or bf16"
            )),
        }
    }
}

/// What is kept of each element, component after component: the master, then the moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateFormat {
    /// The master.
    pub master: Master,
    /// The moments' type.
    pub moment: Moment,
    /// How many moments: at most two.
    pub moments: u32,
}

impl StateFormat {
    /// Bytes of an element's master.
    pub const fn master_bytes(&self) -> u64 {
        match self.master {
            Master::F32 => 4,
            Master::Split => 2,
        }
    }

    /// Bytes of an element.
    pub const fn bytes(&self) -> u64 {
        self.master_bytes() + self.moments as u64 * self.moment.bytes()
    }

    /// Whether it is what AdamW's own loops take.
    pub(crate) fn plain(&self) -> bool {
        (self.master, self.moment, self.moments) == (Master::F32, Moment::F32, 2)
    }

    /// The states of elements `range` of a part of `elements`, whose memory this is.
    ///
    /// # Panics
    /// If the memory is too small, or not aligned as its values are.
    pub fn view<'a>(
        &self,
        memory: &'a mut [u8],
        elements: usize,
        range: Range<usize>,
    ) -> Stored<'a> {
        let (master, mut rest) = memory.split_at_mut(self.master_bytes() as usize * elements);
        let master = match self.master {
            Master::F32 => MasterOf::F32(&mut bytemuck::cast_slice_mut(master)[range.clone()]),
            Master::Split => MasterOf::Rest(&mut bytemuck::cast_slice_mut(master)[range.clone()]),
        };
        let mut moments = [MomentOf::None, MomentOf::None];
        for moment in &mut moments[..self.moments as usize] {
            let (own, others) = rest.split_at_mut(self.moment.bytes() as usize * elements);
            rest = others;
            *moment = match self.moment {
                Moment::F32 => MomentOf::F32(&mut bytemuck::cast_slice_mut(own)[range.clone()]),
                Moment::Bf16 => MomentOf::Bf16(&mut bytemuck::cast_slice_mut(own)[range.clone()]),
            };
        }
        Stored { master, moments }
    }

    /// Fills the memory of a part with masters (of split ones, with what their parameters are short of them) and moments
    /// of zero.
    ///
    /// # Panics
    /// As [`StateFormat::view`].
    pub fn fill(&self, memory: &mut [u8], masters: &[f32]) {
        let n = masters.len();
        memory[..self.bytes() as usize * n].fill(0);
        match self.view(memory, n, 0..n).master {
            MasterOf::F32(to) => to.copy_from_slice(masters),
            MasterOf::Rest(to) => {
                for (to, master) in to.iter_mut().zip(masters) {
                    *to = split(*master).1;
                }
            }
        }
    }

    /// The masters of a part, the parameters being these (of a split one), into `out`.
    ///
    /// # Panics
    /// As [`StateFormat::view`].
    pub fn masters(&self, memory: &mut [u8], params: &[u16], out: &mut [f32]) {
        let n = out.len();
        match self.view(memory, n, 0..n).master {
            MasterOf::F32(from) => out.copy_from_slice(from),
            MasterOf::Rest(from) => {
                for ((out, rest), param) in out.iter_mut().zip(from).zip(params) {
                    *out = join(*param, *rest);
                }
            }
        }
    }
}

/// A master as its parameter and what that is short of it.
#[inline(always)]
pub(super) fn split(master: f32) -> (u16, u16) {
    let param = crate::cpu::cast::round_to_bf16(master).to_bits();
    let rest = master.to_bits().wrapping_sub(u32::from(param) << 16);
    (param, rest as u16)
}

/// The inverse of [`split`], for all that is not NaN.
#[inline(always)]
pub(super) fn join(param: u16, rest: u16) -> f32 {
    let rest = i32::from(rest.cast_signed()).cast_unsigned();
    f32::from_bits((u32::from(param) << 16).wrapping_add(rest))
}

/// The master of a run of elements.
#[derive(Debug)]
pub(super) enum MasterOf<'a> {
    F32(&'a mut [f32]),
    Rest(&'a mut [u16]),
}

/// A moment of a run of elements.
#[derive(Debug)]
pub(super) enum MomentOf<'a> {
    None,
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl MomentOf<'_> {
    #[inline(always)]
    fn part(&mut self, at: Range<usize>) -> MomentOf<'_> {
        match self {
            Self::None => MomentOf::None,
            Self::F32(it) => MomentOf::F32(&mut it[at]),
            Self::Bf16(it) => MomentOf::Bf16(&mut it[at]),
        }
    }
}

/// The states of a run of elements, as a [`StateFormat`] keeps them.
#[derive(Debug)]
pub struct Stored<'a> {
    pub(super) master: MasterOf<'a>,
    pub(super) moments: [MomentOf<'a>; 2],
}

impl<'a> From<States<'a>> for Stored<'a> {
    fn from(states: States<'a>) -> Self {
        Self {
            master: MasterOf::F32(states.master),
            moments: [MomentOf::F32(states.m), MomentOf::F32(states.v)],
        }
    }
}

impl<'a> Stored<'a> {
    /// The same states, for a shorter time.
    pub fn reborrow(&mut self) -> Stored<'_> {
        let len = match &self.master {
            MasterOf::F32(it) => it.len(),
            MasterOf::Rest(it) => it.len(),
        };
        self.part(0..len)
    }

    /// Those of some of the elements, for a shorter time.
    #[inline(always)]
    pub(super) fn part(&mut self, at: Range<usize>) -> Stored<'_> {
        let master = match &mut self.master {
            MasterOf::F32(it) => MasterOf::F32(&mut it[at.clone()]),
            MasterOf::Rest(it) => MasterOf::Rest(&mut it[at.clone()]),
        };
        let [m, v] = &mut self.moments;
        Stored {
            master,
            moments: [m.part(at.clone()), v.part(at)],
        }
    }

    /// As f32 and two f32 moments, if that is what they are.
    pub(super) fn into_plain(self) -> Result<States<'a>, Self> {
        match (self.master, self.moments) {
            (MasterOf::F32(master), [MomentOf::F32(m), MomentOf::F32(v)]) => {
                Ok(States { master, m, v })
            }
            (master, moments) => Err(Self { master, moments }),
        }
    }
}
