//! The optimizers that pass through a frame, as `optimizers.cu` declares them, with the bits that the contract of
//! numbers demands.

use super::{Call, Result, bf16, from_bf16};

/// States and parameters of a launch, in f32.
struct Memory<'c, 'a> {
    call: &'c Call<'a>,
    n: usize,
    p: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl<'c, 'a> Memory<'c, 'a> {
    fn read(call: &'c Call<'a>) -> Result<Self> {
        let n = call.number("n")?;
        let p = if call.given("rest")? {
            let both = call
                .halves("param", n)?
                .into_iter()
                .zip(call.halves("rest", n)?);
            let join = |(param, rest): (u16, u16)| {
                let rest = i32::from(rest.cast_signed()).cast_unsigned();
                f32::from_bits((u32::from(param) << 16).wrapping_add(rest))
            };
            both.map(join).collect()
        } else {
            call.floats("master", 0, n)?
        };
        let moment = |wide: &str, narrow: &str| match (call.given(wide)?, call.given(narrow)?) {
            (true, _) => call.floats(wide, 0, n),
            (_, true) => call.floats(narrow, 0, n),
            _ => Ok(vec![0.0; n]),
        };
        let (m, v) = (moment("m", "m_half")?, moment("v", "v_half")?);
        Ok(Self { call, n, p, m, v })
    }

    /// Stores the moments, and goes on with them as they are stored.
    fn put_moments(&mut self) -> Result<()> {
        for (wide, narrow, values) in [("m", "m_half", &mut self.m), ("v", "v_half", &mut self.v)] {
            if self.call.given(wide)? {
                self.call.put(wide, 0, values)?;
            } else if self.call.given(narrow)? {
                self.call.put(narrow, 0, values)?;
                values.iter_mut().for_each(|x| *x = from_bf16(bf16(*x)));
            }
        }
        Ok(())
    }

    fn put_masters(&self) -> Result<()> {
        if !self.call.given("rest")? {
            self.call.put("master", 0, &self.p)?;
            return self.call.put("param", 0, &self.p);
        }
        let params: Vec<u16> = self.p.iter().map(|p| bf16(*p)).collect();
        let rest =
            |(p, param): (&f32, &u16)| p.to_bits().wrapping_sub(u32::from(*param) << 16) as u16;
        let rests: Vec<u16> = self.p.iter().zip(&params).map(rest).collect();
        self.call.put_halves("param", &params)?;
        self.call.put_halves("rest", &rests)
    }
}

/// (master, moment, moment) after the step of the rule.
fn rule(which: usize, s: &[f32; 10], grad: f32, (p, m, v): (f32, f32, f32)) -> (f32, f32, f32) {
    let [a, b, c, d, e, f, g, h, i, _] = *s;
    match which {
        1 => {
            let grad = grad * a;
            let m = c.mul_add(m, d * grad);
            let v = e.mul_add(v, (f * grad) * grad);
            (h.mul_add(m / v.sqrt().mul_add(i, g), p * b), m, v)
        }
        2 => {
            let grad = b.mul_add(p, grad * a);
            let m = c.mul_add(m, grad);
            let along = if d == 0.0 { m } else { c.mul_add(m, grad) };
            (e.mul_add(along, p), m, v)
        }
        3 => {
            let grad = grad * a;
            let blend = c.mul_add(m, d * grad);
            let sign = f32::from(i8::from(blend > 0.0) - i8::from(blend < 0.0));
            (g.mul_add(sign, p * b), e.mul_add(m, f * grad), v)
        }
        _ => {
            let grad = b.mul_add(p, grad * a);
            let m = grad.mul_add(grad, m);
            (d.mul_add(grad / (m.sqrt() + c), p), m, v)
        }
    }
}

fn numbers(call: &Call<'_>) -> Result<[f32; 10]> {
    let mut all = [0.0; 10];
    for (value, name) in all
        .iter_mut()
        .zip(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"])
    {
        *value = call.field_real("o", name)?;
    }
    Ok(all)
}

pub(super) fn update(call: &Call<'_>) -> Result<()> {
    let mut memory = Memory::read(call)?;
    let (which, s) = (call.field_number("o", "rule")?, numbers(call)?);
    if which != 0 {
        let grad = call.floats("grad", 0, memory.n)?;
        for (i, grad) in grad.into_iter().enumerate() {
            let new = rule(which, &s, grad, (memory.p[i], memory.m[i], memory.v[i]));
            (memory.p[i], memory.m[i], memory.v[i]) = new;
        }
        memory.put_moments()?;
    }
    memory.put_masters()
}

fn direction(s: &[f32; 10], p: f32, m: f32, v: f32) -> f32 {
    s[1].mul_add(p, (m * s[7]) / v.sqrt().mul_add(s[8], s[6]))
}

pub(super) fn lamb_moments(call: &Call<'_>) -> Result<()> {
    let mut memory = Memory::read(call)?;
    let (s, strand, n) = (numbers(call)?, call.number("strand")?, memory.n);
    for (i, grad) in call.floats("grad", 0, n)?.into_iter().enumerate() {
        let g = grad * s[0];
        memory.m[i] = s[2].mul_add(memory.m[i], s[3] * g);
        memory.v[i] = s[4].mul_add(memory.v[i], (s[5] * g) * g);
    }
    memory.put_moments()?;
    let u = |i: usize| direction(&s, memory.p[i], memory.m[i], memory.v[i]);
    let directions: Vec<f32> = (0..n).map(u).collect();
    let mut sums = Vec::new();
    for values in [&memory.p, &directions] {
        let sum_of = |at: usize| {
            let range = (at * strand).min(n)..((at + 1) * strand).min(n);
            let mut lanes = [0.0f64; 16];
            for (i, x) in values[range].iter().enumerate() {
                lanes[i % 16] += f64::from(*x) * f64::from(*x);
            }
            lanes.iter().fold(0.0, |sum, lane| sum + lane)
        };
        let piece = |block: usize| (0..16).fold(0.0, |sum, s| sum + sum_of(block * 16 + s));
        sums.extend((0..call.blocks()).map(piece));
    }
    call.put_doubles("sums", &sums)
}

pub(super) fn lamb_factor(call: &Call<'_>) -> Result<()> {
    let pieces = call.number("pieces")?;
    let sums = call.doubles("sums", 2 * pieces)?;
    let norm = |sums: &[f64]| sums.iter().fold(0.0, |sum, piece| sum + piece).sqrt();
    let (p, u) = (norm(&sums[..pieces]), norm(&sums[pieces..]));
    let ratio = if p > 0.0 && u > 0.0 { p / u } else { 1.0 };
    let minus_lr = f64::from(call.field_real("o", "j")?);
    call.put_doubles("sums", &[f64::from((minus_lr * ratio) as f32)])
}

pub(super) fn lamb_move(call: &Call<'_>) -> Result<()> {
    let mut memory = Memory::read(call)?;
    let (s, factor) = (numbers(call)?, call.doubles("sums", 1)?[0] as f32);
    for i in 0..memory.n {
        let u = direction(&s, memory.p[i], memory.m[i], memory.v[i]);
        memory.p[i] = factor.mul_add(u, memory.p[i]);
    }
    memory.put_masters()
}
