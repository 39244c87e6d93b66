//! One decoder layer: attention and MLP, each with its norm and residual, forward and backward as
//! mirror images.

use forebay::ops::{self, Assign, AttentionOutput, AttentionShape, Rotation};
use forebay::{
    DType, Frame, Init, Result, Section, SectionId, StageLease, Step, Tensor, TensorMut,
};

use crate::config::{Config, Family};

/// Computes the layers of a decoder for a batch of a given shape.
pub(crate) struct Layer<'c> {
    pub(crate) config: &'c Config,
    pub(crate) batch: usize,
    pub(crate) seq: usize,
}

const INPUT_NORM: &str = "input_layernorm.weight";
const Q: &str = "self_attn.q_proj.weight";
const K: &str = "self_attn.k_proj.weight";
const V: &str = "self_attn.v_proj.weight";
const O: &str = "self_attn.o_proj.weight";
const Q_NORM: &str = "self_attn.q_norm.weight";
const K_NORM: &str = "self_attn.k_norm.weight";
const MLP_NORM: &str = "post_attention_layernorm.weight";
const GATE: &str = "mlp.gate_proj.weight";
const UP: &str = "mlp.up_proj.weight";
const DOWN: &str = "mlp.down_proj.weight";

/// The section of layer `index`.
pub(crate) fn section(config: &Config, index: usize) -> Section {
    let Config {
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        ..
    } = *config;
    let (normal, one) = (Init::Normal(config.init), Init::Constant(1.0));
    let mut section = Section::new(format!("layers.{index}"))
        .tensor(INPUT_NORM, [hidden], one)
        .tensor(Q, [heads * head_dim, hidden], normal)
        .tensor(K, [kv_heads * head_dim, hidden], normal)
        .tensor(V, [kv_heads * head_dim, hidden], normal)
        .tensor(O, [hidden, heads * head_dim], normal);
    if config.family == Family::Qwen3 {
        section = section
            .tensor(Q_NORM, [head_dim], one)
            .tensor(K_NORM, [head_dim], one);
    }
    section
        .tensor(MLP_NORM, [hidden], one)
        .tensor(GATE, [intermediate, hidden], normal)
        .tensor(UP, [intermediate, hidden], normal)
        .tensor(DOWN, [hidden, intermediate], normal)
}

/// What the forward pass of attention leaves for the backward pass.
struct Attended<'f> {
    normed: TensorMut<'f>,
    /// Queries and keys before their norms, if they have any.
    raw: Option<[TensorMut<'f>; 2]>,
    q: TensorMut<'f>,
    k: TensorMut<'f>,
    v: TensorMut<'f>,
    out: TensorMut<'f>,
    lse: TensorMut<'f>,
}

/// What the forward pass of the MLP leaves for the backward pass.
struct Gated<'f> {
    normed: TensorMut<'f>,
    gate: TensorMut<'f>,
    up: TensorMut<'f>,
    inner: TensorMut<'f>,
}

/// A layer's weights on the device.
#[derive(Clone, Copy)]
struct Weights<'l> {
    lease: &'l StageLease<'l>,
    section: SectionId,
}

impl<'l> Weights<'l> {
    fn param(&self, name: &str) -> Result<Tensor<'l>> {
        self.lease.param(self.section, name)
    }

    fn grad(&self, name: &str) -> Result<TensorMut<'l>> {
        self.lease.grad(self.section, name)
    }
}

impl Layer<'_> {
    pub(crate) fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    fn attention_shape(&self) -> AttentionShape {
        let Config {
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.config;
        AttentionShape {
            batch: self.batch,
            seq: self.seq,
            heads,
            kv_heads,
            head_dim,
        }
    }

    /// `x` becomes the layer's output.
    pub(crate) fn forward(
        &self,
        step: &Step<'_>,
        lease: &StageLease<'_>,
        section: SectionId,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        let w = Weights { lease, section };
        let frame = step.frame();
        let mut branch = frame.tensor([self.tokens(), self.config.hidden])?;
        {
            let inner = step.frame();
            let attended = self.attend(step, &inner, w, &x.as_ref())?;
            self.project(step, w, &attended, &mut branch)?;
        }
        ops::add_assign(step, x, &branch.as_ref())?;
        {
            let inner = step.frame();
            let gated = self.gate(step, &inner, w, &x.as_ref())?;
            ops::linear(step, &gated.inner.as_ref(), &w.param(DOWN)?, &mut branch)?;
        }
        ops::add_assign(step, x, &branch.as_ref())
    }

    /// From the layer's input `x` and the gradient of its output in `dx`: recomputes the forward
    /// pass, adds to the weights' gradients, and leaves the gradient of the input in `dx`.
    pub(crate) fn backward(
        &self,
        step: &Step<'_>,
        lease: &StageLease<'_>,
        section: SectionId,
        x: &Tensor<'_>,
        dx: &mut TensorMut<'_>,
    ) -> Result<()> {
        let w = Weights { lease, section };
        let frame = step.frame();
        let mut middle = frame.tensor([self.tokens(), self.config.hidden])?;
        let attended = self.attend(step, &frame, w, x)?;
        self.project(step, w, &attended, &mut middle)?;
        ops::add_assign(step, &mut middle, x)?;
        {
            let inner = step.frame();
            let gated = self.gate(step, &inner, w, &middle.as_ref())?;
            self.gate_backward(step, w, &middle.as_ref(), &gated, dx)?;
        }
        self.attend_backward(step, w, x, attended, dx)
    }

    /// Norm, projections, positions and attention, up to the output projection.
    fn attend<'f>(
        &self,
        step: &Step<'_>,
        frame: &'f Frame<'_>,
        w: Weights<'_>,
        x: &Tensor<'_>,
    ) -> Result<Attended<'f>> {
        let Config {
            hidden,
            heads,
            kv_heads,
            head_dim,
            eps,
            ..
        } = *self.config;
        let t = self.tokens();
        let mut normed = frame.tensor([t, hidden])?;
        ops::rms_norm(step, x, &w.param(INPUT_NORM)?, eps, &mut normed)?;
        let mut q = frame.tensor([t, heads, head_dim])?;
        let mut k = frame.tensor([t, kv_heads, head_dim])?;
        let mut v = frame.tensor([t, kv_heads, head_dim])?;
        for (name, out, heads) in [
            (Q, &mut q, heads),
            (K, &mut k, kv_heads),
            (V, &mut v, kv_heads),
        ] {
            let mut flat = out.reshape([t, heads * head_dim])?;
            ops::linear(step, &normed.as_ref(), &w.param(name)?, &mut flat)?;
        }
        let mut raw = None;
        if self.config.family == Family::Qwen3 {
            let (raw_q, raw_k) = (q, k);
            q = frame.tensor([t, heads, head_dim])?;
            k = frame.tensor([t, kv_heads, head_dim])?;
            ops::rms_norm(step, &raw_q.as_ref(), &w.param(Q_NORM)?, eps, &mut q)?;
            ops::rms_norm(step, &raw_k.as_ref(), &w.param(K_NORM)?, eps, &mut k)?;
            raw = Some([raw_q, raw_k]);
        }
        for x in [&mut q, &mut k] {
            ops::rope(step, x, self.seq, self.config.theta, Rotation::Forward)?;
        }
        let mut out = frame.tensor([t, heads, head_dim])?;
        let mut lse = frame.tensor_of(DType::F32, [self.batch, heads, self.seq])?;
        let qkv = [&q.as_ref(), &k.as_ref(), &v.as_ref()];
        ops::attention(step, self.attention_shape(), qkv, &mut out, &mut lse)?;
        Ok(Attended {
            normed,
            raw,
            q,
            k,
            v,
            out,
            lse,
        })
    }

    fn project(
        &self,
        step: &Step<'_>,
        w: Weights<'_>,
        attended: &Attended<'_>,
        branch: &mut TensorMut<'_>,
    ) -> Result<()> {
        let out = attended.out.as_ref().reshape(self.flat())?;
        ops::linear(step, &out, &w.param(O)?, branch)
    }

    /// The shape of all heads of all tokens as rows.
    fn flat(&self) -> [usize; 2] {
        [self.tokens(), self.config.heads * self.config.head_dim]
    }

    /// The backward of [`Layer::attend`] and [`Layer::project`], the residual included.
    fn attend_backward(
        &self,
        step: &Step<'_>,
        w: Weights<'_>,
        x: &Tensor<'_>,
        mut attended: Attended<'_>,
        dx: &mut TensorMut<'_>,
    ) -> Result<()> {
        let Config {
            hidden,
            heads,
            kv_heads,
            head_dim,
            eps,
            ..
        } = *self.config;
        let t = self.tokens();
        let frame = step.frame();
        let mut dout = frame.tensor(self.flat())?;
        let out = attended.out.as_ref().reshape(self.flat())?;
        ops::linear_dw(step, &out, &dx.as_ref(), &mut w.grad(O)?)?;
        ops::linear_dx(step, &dx.as_ref(), &w.param(O)?, &mut dout, Assign::Set)?;

        let mut dq = frame.tensor([t, heads, head_dim])?;
        let mut dk = frame.tensor([t, kv_heads, head_dim])?;
        let mut dv = frame.tensor([t, kv_heads, head_dim])?;
        let qkv = [
            &attended.q.as_ref(),
            &attended.k.as_ref(),
            &attended.v.as_ref(),
        ];
        let output = AttentionOutput {
            out: attended.out.as_ref(),
            lse: attended.lse.as_ref(),
        };
        let dout = dout.as_ref().reshape([t, heads, head_dim])?;
        let grads = [dq.reborrow(), dk.reborrow(), dv.reborrow()];
        ops::attention_backward(step, self.attention_shape(), qkv, output, &dout, grads)?;
        for x in [&mut dq, &mut dk] {
            ops::rope(step, x, self.seq, self.config.theta, Rotation::Backward)?;
        }
        let (mut dq, mut dk) = (dq.as_ref(), dk.as_ref());
        if let Some([raw_q, raw_k]) = &attended.raw {
            // The rotated queries and keys are used up: their memory takes the gradients.
            for (name, raw, dy, out) in [
                (Q_NORM, raw_q, &dq, &mut attended.q),
                (K_NORM, raw_k, &dk, &mut attended.k),
            ] {
                let (raw, weight, grad) = (raw.as_ref(), w.param(name)?, &mut w.grad(name)?);
                ops::rms_norm_backward(step, &raw, &weight, eps, dy, out, Assign::Set, grad)?;
            }
            (dq, dk) = (attended.q.as_ref(), attended.k.as_ref());
        }
        let mut dnormed = frame.tensor([t, hidden])?;
        let normed = attended.normed.as_ref();
        for (name, dy, heads, assign) in [
            (Q, &dq, heads, Assign::Set),
            (K, &dk, kv_heads, Assign::Add),
            (V, &dv.as_ref(), kv_heads, Assign::Add),
        ] {
            let dy = dy.reshape([t, heads * head_dim])?;
            ops::linear_dw(step, &normed, &dy, &mut w.grad(name)?)?;
            ops::linear_dx(step, &dy, &w.param(name)?, &mut dnormed, assign)?;
        }
        let (weight, grad) = (w.param(INPUT_NORM)?, &mut w.grad(INPUT_NORM)?);
        ops::rms_norm_backward(
            step,
            x,
            &weight,
            eps,
            &dnormed.as_ref(),
            dx,
            Assign::Add,
            grad,
        )
    }

    /// Norm, gate and up projections, and their product, up to the down projection.
    fn gate<'f>(
        &self,
        step: &Step<'_>,
        frame: &'f Frame<'_>,
        w: Weights<'_>,
        x: &Tensor<'_>,
    ) -> Result<Gated<'f>> {
        let Config {
            hidden,
            intermediate,
            eps,
            ..
        } = *self.config;
        let t = self.tokens();
        let mut normed = frame.tensor([t, hidden])?;
        ops::rms_norm(step, x, &w.param(MLP_NORM)?, eps, &mut normed)?;
        let mut gate = frame.tensor([t, intermediate])?;
        let mut up = frame.tensor([t, intermediate])?;
        ops::linear(step, &normed.as_ref(), &w.param(GATE)?, &mut gate)?;
        ops::linear(step, &normed.as_ref(), &w.param(UP)?, &mut up)?;
        let mut inner = frame.tensor([t, intermediate])?;
        ops::swiglu(step, &gate.as_ref(), &up.as_ref(), &mut inner)?;
        Ok(Gated {
            normed,
            gate,
            up,
            inner,
        })
    }

    /// The backward of [`Layer::gate`] and the down projection, the residual included.
    fn gate_backward(
        &self,
        step: &Step<'_>,
        w: Weights<'_>,
        x: &Tensor<'_>,
        gated: &Gated<'_>,
        dx: &mut TensorMut<'_>,
    ) -> Result<()> {
        let Config {
            hidden,
            intermediate,
            eps,
            ..
        } = *self.config;
        let t = self.tokens();
        let frame = step.frame();
        let mut dinner = frame.tensor([t, intermediate])?;
        ops::linear_dw(
            step,
            &gated.inner.as_ref(),
            &dx.as_ref(),
            &mut w.grad(DOWN)?,
        )?;
        ops::linear_dx(
            step,
            &dx.as_ref(),
            &w.param(DOWN)?,
            &mut dinner,
            Assign::Set,
        )?;
        let mut dgate = frame.tensor([t, intermediate])?;
        let mut dup = frame.tensor([t, intermediate])?;
        let (gate, up) = (gated.gate.as_ref(), gated.up.as_ref());
        ops::swiglu_backward(step, &gate, &up, &dinner.as_ref(), &mut dgate, &mut dup)?;
        let mut dnormed = frame.tensor([t, hidden])?;
        let normed = gated.normed.as_ref();
        for (name, dy, assign) in [(GATE, &dgate, Assign::Set), (UP, &dup, Assign::Add)] {
            ops::linear_dw(step, &normed, &dy.as_ref(), &mut w.grad(name)?)?;
            ops::linear_dx(step, &dy.as_ref(), &w.param(name)?, &mut dnormed, assign)?;
        }
        let (weight, grad) = (w.param(MLP_NORM)?, &mut w.grad(MLP_NORM)?);
        ops::rms_norm_backward(
            step,
            x,
            &weight,
            eps,
            &dnormed.as_ref(),
            dx,
            Assign::Add,
            grad,
        )
    }
}
