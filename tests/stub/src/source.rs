//! Kernels as their CUDA source declares them: which there are, and what their parameters are called
//! and how long they are. Macros are expanded; everything between is skipped.

/// What a parameter holds, or points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    U16,
    U32,
    U64,
    F32,
    F64,
    Bf16,
    F16,
    Struct,
}

impl Kind {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "u16" => Self::U16,
            "u32" | "int" | "unsigned" => Self::U32,
            "u64" | "i64" => Self::U64,
            "float" => Self::F32,
            "double" => Self::F64,
            "bf16" => Self::Bf16,
            "f16" => Self::F16,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::U16 | Self::Bf16 | Self::F16 => 2,
            Self::U32 | Self::F32 => 4,
            Self::U64 | Self::F64 => 8,
            Self::Struct => 0,
        }
    }
}

/// A parameter.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) pointer: bool,
    pub(crate) kind: Kind,
    pub(crate) bytes: usize,
    /// Of a struct: names, kinds and places.
    pub(crate) fields: Vec<(String, Kind, usize)>,
}

/// A kernel.
#[derive(Debug)]
pub(crate) struct Signature {
    pub(crate) name: String,
    pub(crate) parameters: Vec<Parameter>,
}

/// All kernels of a source whose parameters can be understood.
pub(crate) fn signatures(text: &str) -> Vec<Signature> {
    let text = expanded(text);
    let structs = structs(&text);
    let kernels = text.split("__global__").skip(1);
    kernels.filter_map(|rest| kernel(rest, &structs)).collect()
}

/// A function-like macro.
struct Macro {
    name: String,
    parameters: Vec<String>,
    body: String,
}

/// The text without comments and directives, with macros expanded.
fn expanded(text: &str) -> String {
    let lines = text.lines().map(|l| l.split("//").next().unwrap_or(l));
    let joined: String = lines.map(|line| format!("{line}\n")).collect();
    let mut joined = joined.replace("\\\n", " ");
    // A continued line may end in blanks.
    joined = joined.replace("\\ \n", " ");
    let mut macros: Vec<Macro> = Vec::new();
    let mut out = String::new();
    for line in joined.lines() {
        if let Some(define) = line.trim_start().strip_prefix("#define ") {
            let name: String = define.chars().take_while(|c| is_word(*c)).collect();
            macros.retain(|m| m.name != name);
            if let Some((parameters, body)) = arguments(&define[name.len()..]) {
                macros.push(Macro {
                    name,
                    parameters,
                    body: body.to_owned(),
                });
            }
        } else if !line.trim_start().starts_with('#') {
            let mut line = line.to_owned();
            // Macros may use others.
            for _ in 0..4 {
                line = expand(&line, &macros);
            }
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// `(a, b) rest` as its parts; nothing where there is no parenthesis at once.
fn arguments(text: &str) -> Option<(Vec<String>, &str)> {
    if !text.starts_with('(') {
        return None;
    }
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for (at, c) in text.char_indices() {
        match c {
            '(' | '<' | '[' if depth > 0 => depth += 1,
            '(' => {
                depth += 1;
                continue;
            }
            ')' | '>' | ']' => depth -= 1,
            ',' if depth == 1 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        if depth == 0 {
            let parts = parts.into_iter().map(|p| p.trim().to_owned()).collect();
            return Some((parts, &text[at + 1..]));
        }
        parts.last_mut()?.push(c);
    }
    None
}

/// The first word, or what is before it.
fn first_word(text: &str) -> Option<&str> {
    let kind = is_word(text.chars().next()?);
    let end = text.find(|c| is_word(c) != kind);
    Some(&text[..end.unwrap_or(text.len())])
}

/// Words and what is between them.
fn words(text: &str) -> Vec<&str> {
    let mut rest = text;
    let next = || {
        let word = first_word(rest)?;
        rest = &rest[word.len()..];
        Some(word)
    };
    std::iter::from_fn(next).collect()
}

fn expand(line: &str, macros: &[Macro]) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(word) = first_word(rest) {
        rest = &rest[word.len()..];
        let known = macros.iter().find(|m| m.name == word);
        match known.and_then(|m| Some((m, arguments(rest)?))) {
            Some((known, (values, after))) => {
                for word in words(&known.body) {
                    let index = known.parameters.iter().position(|p| p == word);
                    let value = index.and_then(|i| values.get(i));
                    out.push_str(value.map_or(word, String::as_str));
                }
                rest = after;
            }
            None => out.push_str(word),
        }
    }
    out.replace(" ## ", "").replace("##", "")
}

type Fields = Vec<(String, Kind, usize)>;

/// Structs of nothing but numbers.
fn structs(text: &str) -> Vec<(String, Fields)> {
    let mut all = Vec::new();
    for rest in text.split("struct ").skip(1) {
        let Some((name, body)) = rest.split_once('{') else {
            continue;
        };
        let Some((body, _)) = body.split_once('}') else {
            continue;
        };
        let mut fields = Vec::new();
        let mut at = 0usize;
        for line in body.split(';').map(str::trim).filter(|l| !l.is_empty()) {
            let (kind, names) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let Some(kind) = Kind::parse(kind) else {
                fields.clear();
                break;
            };
            for name in names.split(',') {
                at = at.next_multiple_of(kind.bytes());
                fields.push((name.trim().to_owned(), kind, at));
                at += kind.bytes();
            }
        }
        if !fields.is_empty() {
            all.push((name.trim().to_owned(), fields));
        }
    }
    all
}

/// What stands behind `__global__`.
fn kernel(rest: &str, structs: &[(String, Fields)]) -> Option<Signature> {
    let mut rest = rest.trim_start();
    loop {
        let word = first_word(rest)?;
        if !word.chars().all(is_word) {
            return None;
        }
        let after = rest[word.len()..].trim_start();
        match arguments(after) {
            Some((_, behind)) if word == "__launch_bounds__" => rest = behind.trim_start(),
            Some((parameters, _)) => {
                let parameters = parameters.iter().filter(|p| !p.is_empty());
                return Some(Signature {
                    name: word.to_owned(),
                    parameters: parameters
                        .map(|p| parameter(p, structs))
                        .collect::<Option<_>>()?,
                });
            }
            None => rest = after,
        }
    }
}

fn parameter(text: &str, structs: &[(String, Fields)]) -> Option<Parameter> {
    let name = words(text).last()?.to_string();
    let mut kinds = words(text).into_iter().filter(|w| {
        let noise = ["const", "__restrict__", "long", "struct"].contains(w);
        w.chars().all(is_word) && !noise
    });
    let of = kinds.next()?;
    let pointer = text.contains('*');
    let known = structs.iter().find(|(name, _)| name == of);
    let fields = known.map_or_else(Vec::new, |(_, fields)| fields.clone());
    let kind = match Kind::parse(of) {
        Some(kind) => kind,
        None if pointer || known.is_some() => Kind::Struct,
        None => return None,
    };
    let bytes = match fields.iter().map(|(_, kind, at)| at + kind.bytes()).max() {
        _ if pointer => 8,
        Some(bytes) => bytes.next_multiple_of(4),
        None => kind.bytes(),
    };
    Some(Parameter {
        name,
        pointer,
        kind,
        bytes,
        fields,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_come_out_of_macros_and_launch_bounds() {
        let text = r#"
typedef unsigned int u32;
struct Dims { u32 batch, seq; };  // sizes
#define KERNELS(G, P)                          \
    extern "C" __global__ void __launch_bounds__(256) \
        adamw_##G##_##P(Dims n, const G* grad, P* param, u64 count) { body(n); }
KERNELS(float, bf16)
extern "C" __global__ void trap() { asm("trap;"); }
"#;
        let all = signatures(text);
        assert_eq!(all.len(), 2, "{all:?}");
        assert_eq!(all[0].name, "adamw_float_bf16");
        let sizes: Vec<usize> = all[0].parameters.iter().map(|p| p.bytes).collect();
        assert_eq!(sizes, [8, 8, 8, 8]);
        assert_eq!(all[0].parameters[2].kind, Kind::Bf16);
        assert_eq!(all[0].parameters[0].fields[1].0, "seq");
        assert!(all[1].parameters.is_empty());
    }
}
