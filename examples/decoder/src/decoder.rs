//! The whole model: its sections, the stages of a step, and what runs in each.

use forebay::ops::{self, ClassifierGrads, IGNORED};
use forebay::{
    DType, Error, Footprint, Init, Model, Pass, Result, Section, SectionId, Stage, StageId,
    StageLease, Step, Target, TensorMut, footprint,
};

use crate::config::Config;
use crate::layer::{self, Layer};

/// Token ids and what should follow each, `[batch, seq]`, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Targets; [`IGNORED`] for those that do not count.
    pub targets: &'a [u32],
}

/// Which positions of a sequence logits are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// The last of each sequence.
    Last,
    /// All.
    All,
}

/// Called when a section's gradient is whole, before it leaves the device.
pub type Observer<'o> = dyn FnMut(&StageLease<'_>, SectionId) -> Result<()> + 'o;

/// A decoder for batches of one shape.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    batch: usize,
    seq: usize,
    /// Tokens that a layer computes on at once, whole sequences.
    piece: usize,
    model: Model,
    embed: SectionId,
    layers: Vec<SectionId>,
    norm: SectionId,
    head: SectionId,
    train: Stages,
    eval: Stages,
}

/// The stages of a pass.
#[derive(Debug)]
struct Stages {
    embed: StageId,
    layers: Vec<StageId>,
    head: StageId,
    /// In compute order: the last layer first; empty in evaluation.
    backward: Vec<StageId>,
    embed_backward: Option<StageId>,
}

const WEIGHT: &str = "weight";

impl Decoder {
    /// Lays out a model for batches of `batch` sequences of `seq` tokens, computing in f32.
    ///
    /// # Errors
    /// [`Error::Model`] for an empty batch.
    pub fn new(config: Config, batch: usize, seq: usize) -> Result<Self> {
        Self::compute_in(DType::F32, config, batch, seq)
    }

    /// As [`Decoder::new`], with parameters and activations of this type.
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn compute_in(dtype: DType, config: Config, batch: usize, seq: usize) -> Result<Self> {
        if batch * seq == 0 {
            return Err(Error::Model(
                "a batch needs at least one sequence of one token".into(),
            ));
        }
        let Config {
            hidden,
            vocabulary,
            layers,
            ..
        } = config;
        let mut model = Model::new(format!("decoder {config:?}")).compute_in(dtype);
        let table = |name: &str| {
            Section::new(name).tensor(WEIGHT, [vocabulary, hidden], Init::Normal(config.init))
        };
        let embed = model.section(table("embed_tokens"));
        let layers: Vec<_> = (0..layers)
            .map(|i| model.section(layer::section(&config, i)))
            .collect();
        let norm = Section::new("norm").tensor(WEIGHT, [hidden], Init::Constant(1.0));
        let norm = model.section(norm);
        let head = if config.tied {
            embed
        } else {
            model.section(table("lm_head"))
        };
        let state = [batch * seq, hidden];
        let train = Stages::train(&mut model, embed, &layers, [norm, head], state);
        let eval = Stages::eval(&mut model, embed, &layers, [norm, head]);
        Ok(Self {
            config,
            batch,
            seq,
            piece: batch * seq,
            model,
            embed,
            layers,
            norm,
            head,
            train,
            eval,
        })
    }

    /// Computes each layer on the batch in so many pieces, whose gradients add up: in memory for activations of
    /// one piece, plus the states between layers. A layer takes all pieces before the next one does, so
    /// that its parameters come and its gradient leaves once. The bits of sums depend on the number.
    ///
    /// # Errors
    /// [`Error::Model`] if the pieces would not be equally many whole sequences.
    pub fn in_micro_batches(mut self, pieces: usize) -> Result<Self> {
        if pieces == 0 || !self.batch.is_multiple_of(pieces) {
            let what = format!(
                "{} sequences are not {pieces} equal micro-batches",
                self.batch
            );
            return Err(Error::Model(what));
        }
        self.piece = self.batch / pieces * self.seq;
        Ok(self)
    }

    /// The model as the runtime takes it.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What a step of this decoder needs besides its sections, on what [`forebay::Options::target`] says.
    ///
    /// # Errors
    /// None that a decoder that could be made would give.
    pub fn footprint(&self, target: Target) -> Result<Footprint> {
        let zeros = vec![0; self.batch * self.seq];
        let batch = Batch {
            ids: &zeros,
            targets: &zeros,
        };
        let train = footprint(&self.model, Pass::Train, target, |step| {
            self.train_step(step, &batch)
        })?;
        let loss = footprint(&self.model, Pass::Eval, target, |step| {
            self.eval_loss(step, &batch).map(|_| ())
        })?;
        let logits = footprint(&self.model, Pass::Eval, target, |step| {
            self.logits(step, &zeros, self.seq, Positions::All)
                .map(|_| ())
        })?;
        Ok(train.max(loss).max(logits))
    }

    /// The name under which Hugging Face keeps a tensor.
    pub fn hf_name(&self, section: SectionId, tensor: &str) -> String {
        let name = self.model.sections()[section.0 as usize].name();
        if name == "lm_head" {
            format!("{name}.{tensor}")
        } else {
            format!("model.{name}.{tensor}")
        }
    }

    /// Queues a whole training step and reports its loss, the mean over targets that count.
    ///
    /// # Errors
    /// A batch of another shape; whatever the runtime meets.
    pub fn train_step(&self, step: &Step<'_>, batch: &Batch<'_>) -> Result<()> {
        self.train_step_observed(step, batch, &mut |_, _| Ok(()))
    }

    /// As [`Decoder::train_step`], calling `observer` for each section whose gradient (times
    /// [`Step::loss_scale`]) is whole.
    ///
    /// # Errors
    /// As [`Decoder::train_step`], and the observer's own.
    pub fn train_step_observed(
        &self,
        step: &Step<'_>,
        batch: &Batch<'_>,
        observer: &mut Observer<'_>,
    ) -> Result<()> {
        let tokens = self.batch * self.seq;
        let ids = step.upload(batch.ids, [tokens])?;
        let targets = step.upload(batch.targets, [tokens])?;
        let frame = step.frame();
        let mut x = frame.tensor([tokens, self.config.hidden])?;
        self.embed(step, self.train.embed, &ids, &mut x)?;
        for (stage, section) in self.train.layers.iter().zip(&self.layers) {
            let lease = step.enter(*stage)?;
            lease.save(&x.as_ref())?;
            for (start, layer) in self.pieces(tokens, self.seq) {
                let mut x = x.rows(start, layer.tokens())?;
                layer.forward(step, &lease, *section, &mut x)?;
            }
        }
        // From here on `x` is the gradient of the state it was.
        {
            let lease = step.enter(self.train.head)?;
            let loss = self.head(step, &lease, &targets, batch.targets, &mut x, true)?;
            step.loss(&loss.as_ref())?;
            observer(&lease, self.norm)?;
            if self.head != self.embed {
                observer(&lease, self.head)?;
            }
        }
        for (stage, section) in self.train.backward.iter().zip(self.layers.iter().rev()) {
            let lease = step.enter(*stage)?;
            let saved = lease.saved()?;
            for (start, layer) in self.pieces(tokens, self.seq) {
                let (saved, mut dx) = (
                    saved.rows(start, layer.tokens())?,
                    x.rows(start, layer.tokens())?,
                );
                layer.backward(step, &lease, *section, &saved, &mut dx)?;
            }
            observer(&lease, *section)?;
        }
        if let Some(stage) = self.train.embed_backward {
            let lease = step.enter(stage)?;
            let mut grad = lease.grad(self.embed, WEIGHT)?;
            ops::embedding_backward(step, &ids, &x.as_ref(), &mut grad)?;
            observer(&lease, self.embed)?;
        }
        Ok(())
    }

    /// The loss of a batch, without gradients; waits for it.
    ///
    /// # Errors
    /// As [`Decoder::train_step`].
    pub fn eval_loss(&self, step: &Step<'_>, batch: &Batch<'_>) -> Result<f32> {
        let tokens = self.batch * self.seq;
        let ids = step.upload(batch.ids, [tokens])?;
        let targets = step.upload(batch.targets, [tokens])?;
        let frame = step.frame();
        let mut x = frame.tensor([tokens, self.config.hidden])?;
        self.forward(step, self.seq, &ids, &mut x)?;
        let lease = step.enter(self.eval.head)?;
        let loss = self.head(step, &lease, &targets, batch.targets, &mut x, false)?;
        let mut value = [0.0];
        step.read(&loss.as_ref(), &mut value)?;
        Ok(value[0])
    }

    /// Logits of sequences of `seq` tokens, at most as many tokens in all as the decoder was made
    /// for: `[sequences or tokens, vocabulary]`, row-major.
    ///
    /// # Errors
    /// As [`Decoder::train_step`].
    pub fn logits(
        &self,
        step: &Step<'_>,
        ids: &[u32],
        seq: usize,
        positions: Positions,
    ) -> Result<Vec<f32>> {
        let batch = ids.len() / seq.max(1);
        if batch * seq != ids.len() || ids.is_empty() || ids.len() > self.batch * self.seq {
            let what = format!(
                "{} ids are not whole sequences of {seq} that fit",
                ids.len()
            );
            return Err(Error::Shape {
                operation: "logits",
                what,
            });
        }
        let ids = step.upload(ids, [batch * seq])?;
        let frame = step.frame();
        let Config {
            hidden,
            vocabulary,
            eps,
            ..
        } = self.config;
        let mut x = frame.tensor([batch * seq, hidden])?;
        self.forward(step, seq, &ids, &mut x)?;
        let lease = step.enter(self.eval.head)?;
        let mut normed = frame.tensor([batch * seq, hidden])?;
        ops::rms_norm(
            step,
            &x.as_ref(),
            &lease.param(self.norm, WEIGHT)?,
            eps,
            &mut normed,
        )?;
        let (first, stride) = match positions {
            Positions::Last => (seq - 1, seq),
            Positions::All => (0, 1),
        };
        let mut all = Vec::new();
        let mut row = frame.tensor([1, vocabulary])?;
        let weight = lease.param(self.head, WEIGHT)?;
        for token in (first..batch * seq).step_by(stride) {
            ops::linear(step, &normed.as_ref().rows(token, 1)?, &weight, &mut row)?;
            let start = all.len();
            all.resize(start + vocabulary, 0.0);
            step.read(&row.as_ref(), &mut all[start..])?;
        }
        Ok(all)
    }

    /// What computes a layer on so many tokens of whole sequences, piece by piece, and where each begins.
    fn pieces(&self, tokens: usize, seq: usize) -> impl Iterator<Item = (usize, Layer<'_>)> {
        let piece = (self.piece / seq).max(1) * seq;
        (0..tokens).step_by(piece).map(move |start| {
            let layer = Layer {
                config: &self.config,
                batch: piece.min(tokens - start) / seq,
                seq,
            };
            (start, layer)
        })
    }

    fn embed(
        &self,
        step: &Step<'_>,
        stage: StageId,
        ids: &forebay::Tensor<'_>,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        let lease = step.enter(stage)?;
        ops::embedding(step, ids, &lease.param(self.embed, WEIGHT)?, x)
    }

    /// Embedding and layers of an evaluation.
    fn forward(
        &self,
        step: &Step<'_>,
        seq: usize,
        ids: &forebay::Tensor<'_>,
        x: &mut TensorMut<'_>,
    ) -> Result<()> {
        self.embed(step, self.eval.embed, ids, x)?;
        let tokens = ids.shape().elements();
        for (stage, section) in self.eval.layers.iter().zip(&self.layers) {
            let lease = step.enter(*stage)?;
            for (start, layer) in self.pieces(tokens, seq) {
                let mut x = x.rows(start, layer.tokens())?;
                layer.forward(step, &lease, *section, &mut x)?;
            }
        }
        Ok(())
    }

    /// Norm, classifier and loss; with `backward` their gradients too, `x` becoming its own.
    fn head<'s>(
        &self,
        step: &'s Step<'_>,
        lease: &StageLease<'_>,
        targets: &forebay::Tensor<'_>,
        values: &[u32],
        x: &mut TensorMut<'_>,
        backward: bool,
    ) -> Result<TensorMut<'s>> {
        let eps = self.config.eps;
        let counted = values.iter().filter(|t| **t != IGNORED).count().max(1);
        let scale = 1.0 / counted as f32;
        let mut loss = step.tensor(DType::F32, [1])?;
        let frame = step.frame();
        let mut normed = frame.tensor(x.shape())?;
        let (norm, weight) = (
            lease.param(self.norm, WEIGHT)?,
            lease.param(self.head, WEIGHT)?,
        );
        ops::rms_norm(step, &x.as_ref(), &norm, eps, &mut normed)?;
        let normed = normed.as_ref();
        if !backward {
            ops::cross_entropy(step, &normed, &weight, targets, scale, &mut loss, None)?;
            return Ok(loss);
        }
        let mut dnormed = frame.tensor(x.shape())?;
        let dweight = lease.grad(self.head, WEIGHT)?;
        let grads = ClassifierGrads {
            dx: dnormed.reborrow(),
            dweight,
            loss_scale: step.loss_scale()?,
        };
        ops::cross_entropy(
            step,
            &normed,
            &weight,
            targets,
            scale,
            &mut loss,
            Some(grads),
        )?;
        let mut dx = frame.tensor(x.shape())?;
        let (dnormed, grad) = (dnormed.as_ref(), &mut lease.grad(self.norm, WEIGHT)?);
        let set = ops::Assign::Set;
        ops::rms_norm_backward(step, &x.as_ref(), &norm, eps, &dnormed, &mut dx, set, grad)?;
        ops::copy(step, &dx.as_ref(), x)?;
        Ok(loss)
    }
}

impl Stages {
    fn train(
        model: &mut Model,
        embed: SectionId,
        layers: &[SectionId],
        head: [SectionId; 2],
        state: [usize; 2],
    ) -> Self {
        // Where the classifier is the same table, that stage has it whole on the device, and so has this one.
        let first = model.train_stage(Stage::new("embed").gathers([embed]));
        let forward: Vec<_> = layers
            .iter()
            .enumerate()
            .map(|(i, s)| {
                let stage = Stage::new(format!("layer {i} forward"))
                    .params([*s])
                    .saves(state);
                model.train_stage(stage)
            })
            .collect();
        let head = model.train_stage(Stage::new("head").params(head).grads(head));
        let backward = layers
            .iter()
            .zip(&forward)
            .enumerate()
            .rev()
            .map(|(i, (s, saver))| {
                let stage = Stage::new(format!("layer {i} backward"));
                model.train_stage(stage.params([*s]).grads([*s]).restores(*saver))
            });
        let backward = backward.collect();
        let last = model.train_stage(Stage::new("embed backward").grads([embed]));
        Self {
            embed: first,
            layers: forward,
            head,
            backward,
            embed_backward: Some(last),
        }
    }

    fn eval(
        model: &mut Model,
        embed: SectionId,
        layers: &[SectionId],
        head: [SectionId; 2],
    ) -> Self {
        let embed = model.eval_stage(Stage::new("embed").gathers([embed]));
        let stage = |(i, s): (usize, &SectionId)| {
            model.eval_stage(Stage::new(format!("layer {i}")).params([*s]))
        };
        let layers = layers.iter().enumerate().map(stage).collect();
        let head = model.eval_stage(Stage::new("head").params(head));
        Self {
            embed,
            layers,
            head,
            backward: Vec::new(),
            embed_backward: None,
        }
    }
}
