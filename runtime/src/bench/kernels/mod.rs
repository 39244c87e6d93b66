//! What each kernel takes for the shapes of a decoder, beside the device's own ceilings, and its share of
//! a training step with activation checkpointing (forward, recomputation and backward once each).
//!
//! Every kernel is timed by events around each of its launches, on random data, in operands that take
//! turns so that they come from memory and not from caches. Ceilings, measured before and after: a copy of
//! 1 GiB within device memory (read and write counted), and a product of 8192 cubed in bf16.

mod cases;

use std::rc::Rc;

use forebay_kernels::cuda::ops::{Queue, linear, linear_dx, linear_scratch};
use forebay_kernels::cuda::{
    CudaError, Element, Kernels as Compiled, check, libraries, probe, sys,
};

use super::gpu::{BareStream, DeviceMemory, Gpu, failed};
use crate::error::{Error, Result};
use crate::nvme::bench::median;
use crate::tensor::DType;
use cases::{Case, Done, Fill, Places};

/// The shapes of a decoder and of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shapes {
    /// Elements of a token's state.
    pub hidden: usize,
    /// Heads, of keys and values as many as of queries.
    pub heads: usize,
    /// Elements between the two halves of a feed-forward layer.
    pub ffn: usize,
    /// Token ids.
    pub vocabulary: usize,
    /// Layers.
    pub layers: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Of each sequence.
    pub seq: usize,
    /// Whether the optimizer runs on the device: its states stay there.
    pub resident: bool,
}

impl Shapes {
    fn check(&self) -> Result<()> {
        let d = self.hidden / self.heads.max(1);
        let heads = self.heads;
        let wrong = if heads == 0 || !self.hidden.is_multiple_of(8 * heads) || d == 0 || d > 256 {
            "heads must divide hidden into multiples of 8 of at most 256"
        } else if self.seq == 0 || self.tokens == 0 || !self.tokens.is_multiple_of(self.seq) {
            "tokens must be whole sequences"
        } else if self.ffn == 0 || self.layers == 0 || self.vocabulary < 2 {
            "ffn, layers and vocabulary must not be empty"
        } else if self.vocabulary.max(self.tokens).max(self.ffn) >= 1 << 24 {
            "shapes of at most 16 M rows"
        } else {
            return Ok(());
        };
        Err(Error::Misuse(wrong.to_owned()))
    }
}

/// What a kernel does at the least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Bytes read and written.
    Bytes(f64),
    /// Floating-point operations.
    Flops(f64),
}

/// What was found for one kernel.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    /// The shape, for people.
    pub shape: String,
    /// Seconds of a launch, median.
    pub seconds: f64,
    /// What it did in that time.
    pub work: Work,
    /// Bytes or operations a second, in parts of the ceiling.
    pub ratio: f64,
    /// Launches of a step; none where it runs elsewhere (an update on the CPU) or as part of another.
    pub launches: u32,
    /// Part of a step's time in kernels.
    pub share: f64,
}

/// Everything found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device.
    pub device: String,
    /// Bytes per second of a copy within the device, read and write counted: before and after.
    pub copy_bytes_per_s: [f64; 2],
    /// Operations per second of the product: before and after.
    pub product_flops: [f64; 2],
    /// By kernel.
    pub rows: Vec<Row>,
    /// The sum of all launches of a step, in seconds.
    pub step_seconds: f64,
}

/// Measures, with so many launches of each kernel. `progress` is told what is being done.
///
/// # Errors
/// [`Error::Measure`] without a GPU, and where it refuses something; [`Error::Misuse`] for shapes that
/// cannot be.
pub fn run(shapes: Shapes, launches: u32, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    shapes.check()?;
    let found = probe().and_then(|found| libraries().map(|()| found));
    let found = found.map_err(failed("kernels"))?;
    progress("compiling kernels");
    let bench = Bench::new(launches.max(1), COPY, Element::Bf16).map_err(failed("kernels"))?;
    progress("ceilings");
    let (copy, product) = bench.ceilings().map_err(failed("the ceilings"))?;
    let mut timed = Vec::new();
    for case in cases::all(shapes) {
        progress(case.name);
        let seconds = bench.time_case(&case).map_err(failed(case.name))?;
        timed.push((case, seconds));
    }
    progress("ceilings");
    let after = bench.ceilings().map_err(failed("the ceilings"))?;
    bench.faults().map_err(failed("kernels"))?;
    let (copies, products) = ([copy, after.0], [product, after.1]);
    let step: f64 = timed
        .iter()
        .map(|(case, seconds)| f64::from(case.launches) * seconds)
        .sum();
    let row = |(case, seconds): (Case, f64)| Row {
        ratio: match case.work {
            Work::Bytes(bytes) => bytes / seconds / copies[0].max(copies[1]),
            Work::Flops(flops) => flops / seconds / products[0].max(products[1]),
        },
        name: case.name,
        shape: case.shape,
        seconds,
        work: case.work,
        launches: case.launches,
        share: f64::from(case.launches) * seconds / step,
    };
    Ok(Report {
        device: found.name,
        copy_bytes_per_s: copies,
        product_flops: products,
        rows: timed.into_iter().map(row).collect(),
        step_seconds: step,
    })
}

/// Bytes of random values that operands are filled with, over and over.
const NOISE: usize = 64 << 20;
/// Bytes of the copy that is a ceiling.
const COPY: usize = 1 << 30;
/// Bytes that operands are in all, where one launch needs less: much more than a cache holds.
const TURNS: usize = 512 << 20;
/// Launches that are not counted.
const WARM: usize = 5;

/// Operations per second of a product of `n` cubed in this type, by a few launches.
pub(crate) fn product_rate(dtype: DType, n: usize) -> Result<f64> {
    let found = probe().and_then(|_| libraries());
    found.map_err(failed("a product"))?;
    let rate = Bench::new(8, NOISE, dtype.element()).and_then(|bench| bench.product(n));
    rate.map_err(failed("a product"))
}

struct Bench {
    launches: usize,
    /// The type that products compute in.
    element: Element,
    /// Bytes of the copy.
    copied: usize,
    kernels: Compiled,
    stream: BareStream,
    /// Random values, and the same without signs.
    noise: [DeviceMemory; 2],
    copy: [DeviceMemory; 2],
    fault: DeviceMemory,
    gpu: Rc<Gpu>,
}

impl Bench {
    fn new(launches: u32, copied: usize, element: Element) -> Result<Self, CudaError> {
        let gpu = Gpu::new()?;
        let memory = |bytes: usize| DeviceMemory::new(&gpu, bytes as u64);
        let fault = memory(16)?;
        upload(&fault, 0, &[0u32; 4])?;
        let bench = Self {
            launches: launches as usize,
            kernels: Compiled::new(gpu.device, fault.address())?,
            stream: BareStream::new(&gpu)?,
            noise: [memory(NOISE)?, memory(NOISE)?],
            copy: [memory(copied)?, memory(copied)?],
            element,
            copied,
            fault,
            gpu: Rc::clone(&gpu),
        };
        for (memory, mask) in bench.noise.iter().zip([u16::MAX, u16::MAX >> 1]) {
            upload(memory, 0, &values(mask))?;
        }
        bench.fill(bench.copy[0].address(), copied, &bench.noise[0])?;
        bench.stream.synchronize()?;
        Ok(bench)
    }

    fn queue(&self) -> Queue<'_> {
        Queue {
            kernels: &self.kernels,
            stream: self.stream.stream,
            element: self.element,
        }
    }

    fn copy_within(&self, from: u64, to: u64, bytes: usize) -> Done {
        // SAFETY: the callers' places, both `bytes` long; what they lie in waits for the stream.
        let done = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.stream) };
        check("cuMemcpyDtoDAsync", done)
    }

    fn fill(&self, to: u64, bytes: usize, from: &DeviceMemory) -> Done {
        for at in (0..bytes).step_by(NOISE) {
            self.copy_within(from.address(), to + at as u64, NOISE.min(bytes - at))?;
        }
        Ok(())
    }

    /// Bytes per second of a copy, and operations per second of a product.
    fn ceilings(&self) -> Result<(f64, f64), CudaError> {
        let (from, to) = (self.copy[0].address(), self.copy[1].address());
        let copy = self.time(&mut |_| self.copy_within(from, to, self.copied))?;
        Ok((2.0 * self.copied as f64 / copy, self.product(8192)?))
    }

    /// Operations per second of a product of `n` cubed.
    fn product(&self, n: usize) -> Result<f64, CudaError> {
        let dims = (n, n, n);
        let bytes = n * n * self.element.bytes();
        let all = [Fill::Noise(bytes), Fill::Noise(bytes), Fill::Room(bytes)];
        let room = Fill::Room(linear_scratch(dims));
        let operands = self.operands(&[&all[..], &[room]].concat())?;
        let [a, b, d, room, ..] = operands.places[0];
        // SAFETY: operands as long as the product takes them.
        let forward = self.time(&mut |q| unsafe { linear(q, dims, a, b, d, room) })?;
        // SAFETY: as above.
        let other = self.time(&mut |q| unsafe { linear_dx(q, dims, [a, b, d], false, room) })?;
        Ok(2.0 * (n as f64).powi(3) / forward.min(other))
    }

    fn time_case(&self, case: &Case) -> Result<f64, CudaError> {
        let operands = self.operands(&case.operands)?;
        let mut turn = operands.places.iter().cycle();
        self.time(&mut |queue| match turn.next() {
            Some(places) => (case.run)(queue, places),
            None => Ok(()),
        })
    }

    /// The median time of a launch, in seconds.
    fn time(&self, launch: &mut dyn FnMut(Queue<'_>) -> Done) -> Result<f64, CudaError> {
        for _ in 0..WARM {
            launch(self.queue())?;
        }
        // While these run all launches are queued, so that none waits for the CPU.
        for _ in 0..3 {
            self.copy_within(self.copy[0].address(), self.copy[1].address(), self.copied)?;
        }
        let mut moments = Vec::with_capacity(self.launches);
        for _ in 0..self.launches {
            let start = self.stream.record()?;
            launch(self.queue())?;
            moments.push((start, self.stream.record()?));
        }
        self.stream.synchronize()?;
        let times = moments.iter().map(|(start, end)| end.since(start));
        times.collect::<Result<Vec<_>, _>>().map(median)
    }

    /// Memory for a kernel's operands, as many sets as take turns.
    fn operands(&self, fills: &[Fill]) -> Result<Operands, CudaError> {
        let long = |fill: &Fill| fill.bytes().next_multiple_of(256);
        let one: usize = fills.iter().map(long).sum();
        let sets = TURNS.div_ceil(one).clamp(1, 8);
        let memory = DeviceMemory::new(&self.gpu, (sets * one) as u64)?;
        let mut at = memory.address();
        let mut places = vec![Places::default(); sets];
        for set in &mut places {
            for (place, fill) in set.iter_mut().zip(fills) {
                *place = at;
                match fill {
                    Fill::Noise(bytes) => self.fill(at, *bytes, &self.noise[0])?,
                    Fill::Positive(bytes) => self.fill(at, *bytes, &self.noise[1])?,
                    Fill::Ids(count, below) => {
                        self.stream.synchronize()?;
                        upload(&memory, at - memory.address(), &ids(*count, *below))?;
                    }
                    Fill::Room(_) => {}
                }
                at += long(fill) as u64;
            }
        }
        self.stream.synchronize()?;
        Ok(Operands {
            places,
            _memory: memory,
        })
    }

    /// An error if a kernel met a token id that is none: then its time means nothing.
    fn faults(&self) -> Done {
        let mut word = 0u32;
        // SAFETY: a word of memory on both sides; nothing is under way.
        let done = unsafe {
            self.stream.synchronize()?;
            sys::cuMemcpyDtoH_v2((&raw mut word).cast(), self.fault.address(), 4)
        };
        check("cuMemcpyDtoH", done)?;
        match word {
            0 => Ok(()),
            _ => Err(CudaError::Driver {
                call: "a token id",
                what: format!("position {} is outside the vocabulary", word - 1),
            }),
        }
    }
}

struct Operands {
    places: Vec<Places>,
    _memory: DeviceMemory,
}

/// Copies to `memory`, `at` bytes from its start, and waits.
fn upload<T: Copy>(memory: &DeviceMemory, at: u64, values: &[T]) -> Done {
    // SAFETY: as long as the values are (the callers allocate so), and nothing else uses it.
    let done = unsafe {
        sys::cuMemcpyHtoD_v2(
            memory.address() + at,
            values.as_ptr().cast(),
            size_of_val(values),
        )
    };
    check("cuMemcpyHtoD", done)
}

/// Random numbers, the same in each run.
fn random() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

/// bf16 values of 1/16 to 1 in size, any sign that the mask lets pass. Pairs of them are f32 values of
/// the same sizes.
fn values(mask: u16) -> Vec<u16> {
    let mut random = random();
    let mut value = || {
        let bits = random() >> 20;
        let exponent = 0x7b + (bits & 3) as u16;
        let rest = (bits >> 2) as u16 & 0x807f;
        (rest | exponent << 7) & mask
    };
    (0..NOISE / 2).map(|_| value()).collect()
}

/// Token ids as text has them: the n-th most frequent one n times as rare as the first.
fn ids(count: usize, below: usize) -> Vec<u32> {
    let mut random = random();
    let mut id = || {
        let uniform = (random() >> 11) as f64 / (1u64 << 53) as f64;
        ((below as f64 + 1.0).powf(uniform) - 1.0) as u32
    };
    (0..count).map(|_| id().min(below as u32 - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::harness;

    #[test]
    fn a_product_has_a_rate_in_both_types_on_the_stub_of_cuda_too() {
        if std::env::var_os(harness::INSIDE).is_none() {
            let own =
                "bench::kernels::tests::a_product_has_a_rate_in_both_types_on_the_stub_of_cuda_too";
            harness::run(own, None, &[("FOREBAY_STUB_MEMORY", "2000000000")]).unwrap();
            return;
        }
        for dtype in [DType::F32, DType::Bf16] {
            let rate = product_rate(dtype, 64).unwrap();
            assert!(rate > 0.0 && rate.is_finite(), "{rate}");
        }
    }

    #[test]
    fn noise_is_finite_both_ways_and_not_zero() {
        let noise = values(u16::MAX);
        let float = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        assert!(
            noise
                .iter()
                .all(|x| (0.0625..1.0).contains(&float(*x).abs()))
        );
        let negative = noise.iter().filter(|x| float(**x) < 0.0).count();
        assert!((noise.len() / 3..noise.len() * 2 / 3).contains(&negative));
        assert!(values(u16::MAX >> 1).iter().all(|x| float(*x) > 0.0));
    }

    #[test]
    fn ids_are_those_of_text() {
        let ids = ids(8192, 50304);
        let first = ids.iter().filter(|id| **id == 0).count();
        // ln 2 / ln 50305 of them.
        assert!((400..700).contains(&first), "{first}");
        let most = ids.iter().max().copied().unwrap();
        assert!((40_000..50_304).contains(&most), "{most}");
    }

    #[test]
    fn shapes_that_cannot_be_are_refused_before_a_device_is_looked_for() {
        let shapes = Shapes {
            hidden: 2048,
            heads: 16,
            ffn: 5504,
            vocabulary: 50304,
            layers: 24,
            tokens: 8192,
            seq: 1024,
            resident: false,
        };
        assert!(shapes.check().is_ok());
        let wrong = Shapes {
            seq: 1000,
            ..shapes
        };
        let error = run(wrong, 20, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("whole sequences"), "{error}");
        assert!(Shapes { heads: 3, ..shapes }.check().is_err());
    }
}
