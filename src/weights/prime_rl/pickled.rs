//! Reads the two things that Python processes pickle for a group: NCCL's name for it, and which tensors come next.
//!
//! Nothing is run and nothing is imported. Of pickle's language only the words are known that these two are written in (protocol 2 to
//! 5), and of values only their forms: a row `(name, torch.Size, elements)`, lists of rows, and a dictionary of them by dtype. Anything
//! else is refused by name. No form holds others of its kind, so that nothing grows beyond what was sent.

use std::rc::Rc;

use super::super::manifest::{Dtype, Tensor};

/// Tensors of one dtype, which come as one stretch.
pub(super) type Group = (Dtype, Vec<Tensor>);

/// Why bytes are not what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of {len}: {why}")]
pub(in super::super) struct PickleError {
    at: usize,
    len: usize,
    why: String,
}

/// A tensor as it is described.
#[derive(Debug)]
struct Row {
    name: Rc<str>,
    shape: Rc<[u64]>,
    elements: u64,
}

#[derive(Debug, Clone)]
enum Value {
    Mark,
    Number(u64),
    Text(Rc<str>),
    Bytes(Rc<[u8]>),
    /// Something of a module, by its name.
    Global(Rc<str>),
    Numbers(Rc<[u64]>),
    /// What a shape is made of.
    Sizes(Rc<[u64]>),
    Row(Rc<Row>),
    Rows(Vec<Rc<Row>>),
    Groups(Vec<(Rc<str>, Vec<Rc<Row>>)>),
    /// What a C structure is made of: its bytes, without and with its type.
    State(Rc<[u8]>),
    Structure(Rc<[u8]>),
    /// A list or dictionary that was named for later. Nothing of ours comes back to one.
    Container,
}

/// Of a dictionary `{torch.dtype: [(name, torch.Size, elements)]}`: the tensors, in the order in which their bytes come.
pub(super) fn groups(bytes: &[u8]) -> Result<Vec<Group>, PickleError> {
    let mut reader = Reader::new(bytes);
    let Value::Groups(groups) = reader.read()? else { return Err(reader.fails("no dictionary of tensors")) };
    groups.into_iter().map(|(dtype, rows)| group(&dtype, &rows).map_err(|why| reader.fails(why))).collect()
}

/// Of a `ncclUniqueId`: its bytes.
pub(super) fn unique_id(bytes: &[u8]) -> Result<Vec<u8>, PickleError> {
    let mut reader = Reader::new(bytes);
    match reader.read()? {
        Value::Bytes(id) => Ok(id.to_vec()),
        _ => Err(reader.fails("no ncclUniqueId")),
    }
}

fn group(dtype: &str, rows: &[Rc<Row>]) -> Result<Group, String> {
    let known = dtype.strip_prefix("torch.").and_then(dtype_of);
    let dtype = known.ok_or_else(|| format!("{dtype} is no dtype that a checkpoint holds"))?;
    let tensor = |row: &Rc<Row>| {
        let elements = row.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size));
        if elements != Some(row.elements) {
            return Err(format!("tensor `{}` has {} elements, and a shape of {:?}", row.name, row.elements, row.shape));
        }
        Ok(Tensor { name: row.name.to_string(), dtype, shape: row.shape.to_vec() })
    };
    Ok((dtype, rows.iter().map(tensor).collect::<Result<_, _>>()?))
}

/// PyTorch's names.
fn dtype_of(name: &str) -> Option<Dtype> {
    Some(match name {
        "bool" => Dtype::BOOL,
        "uint8" => Dtype::U8,
        "int8" => Dtype::I8,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        "int16" => Dtype::I16,
        "uint16" => Dtype::U16,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "int32" => Dtype::I32,
        "uint32" => Dtype::U32,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        "int64" => Dtype::I64,
        "uint64" => Dtype::U64,
        _ => return None,
    })
}

/// Runs pickle's words over a stack, as far as they are known.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    memo: Vec<Value>,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, stack: Vec::new(), memo: Vec::new() }
    }

    fn fails(&self, why: impl Into<String>) -> PickleError {
        PickleError { at: self.at, len: self.bytes.len(), why: why.into() }
    }

    fn read(&mut self) -> Result<Value, PickleError> {
        loop {
            let word = self.take(1)?[0];
            if word == b'.' {
                return self.pop();
            }
            self.obey(word)?;
        }
    }

    fn obey(&mut self, word: u8) -> Result<(), PickleError> {
        match word {
            // Which protocol, and how long a frame is.
            0x80 => self.take(1).map(drop),
            0x95 => self.take(8).map(drop),
            b'}' => self.push(Value::Groups(Vec::new())),
            b']' => self.push(Value::Rows(Vec::new())),
            b')' => self.tuple(Vec::new()),
            b'(' => self.push(Value::Mark),
            0x85..=0x87 => {
                let from = self.stack.len().checked_sub(usize::from(word - 0x84));
                let items = self.stack.split_off(from.ok_or_else(|| self.fails("a tuple of too few"))?);
                self.tuple(items)
            }
            b't' => {
                let items = self.since_mark()?;
                self.tuple(items)
            }
            b'K' | b'M' | b'J' | 0x8a => self.number(word),
            0x8c | b'X' | 0x8d => self.text(word),
            b'C' | b'B' | 0x8e => self.raw(word),
            b'c' | 0x93 => self.global(word),
            0x94 | b'q' | b'r' | b'h' | b'j' => self.remember(word),
            b'R' => self.call(),
            b'a' | b'e' => self.append(word),
            b's' | b'u' => self.set(word),
            _ => Err(self.fails(format!("pickle's word {word:#04x} is not among those that are read here"))),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], PickleError> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| self.fails("it breaks off"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// A number of so many bytes, the lowest first.
    fn count(&mut self, bytes: usize) -> Result<usize, PickleError> {
        let mut wide = [0; 8];
        wide[..bytes].copy_from_slice(self.take(bytes)?);
        usize::try_from(u64::from_le_bytes(wide)).map_err(|_| self.fails("a length that cannot be"))
    }

    fn push(&mut self, value: Value) -> Result<(), PickleError> {
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, PickleError> {
        self.stack.pop().ok_or_else(|| self.fails("nothing is there to be taken"))
    }

    fn since_mark(&mut self) -> Result<Vec<Value>, PickleError> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark));
        let items = self.stack.split_off(mark.ok_or_else(|| self.fails("a mark is missing"))? + 1);
        self.stack.pop();
        Ok(items)
    }

    fn number(&mut self, word: u8) -> Result<(), PickleError> {
        let bytes = match word {
            b'K' => 1,
            b'M' => 2,
            b'J' => 4,
            _ => self.count(1)?,
        };
        let mut wide = [0; 8];
        let given = self.take(bytes)?;
        // Of numbers of four bytes and more the highest bit is the sign.
        let is_negative = !matches!(word, b'K' | b'M') && given.last().is_some_and(|high| high & 0x80 != 0);
        if is_negative || given.iter().skip(wide.len()).any(|&high| high != 0) {
            return Err(self.fails("a number that no size can be"));
        }
        let low = &given[..bytes.min(wide.len())];
        wide[..low.len()].copy_from_slice(low);
        self.push(Value::Number(u64::from_le_bytes(wide)))
    }

    fn text(&mut self, word: u8) -> Result<(), PickleError> {
        let len = self.count(match word {
            0x8c => 1,
            b'X' => 4,
            _ => 8,
        })?;
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| self.fails("a name that is no text"))?;
        self.push(Value::Text(text.into()))
    }

    fn raw(&mut self, word: u8) -> Result<(), PickleError> {
        let len = self.count(match word {
            b'C' => 1,
            b'B' => 4,
            _ => 8,
        })?;
        let bytes = self.take(len)?;
        self.push(Value::Bytes(bytes.into()))
    }

    fn global(&mut self, word: u8) -> Result<(), PickleError> {
        let (module, name) = if word == b'c' {
            (self.line()?, self.line()?)
        } else {
            match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => (module, name),
                _ => return Err(self.fails("something of a module, without its name")),
            }
        };
        self.push(Value::Global(format!("{module}.{name}").into()))
    }

    fn line(&mut self) -> Result<Rc<str>, PickleError> {
        let len = self.bytes[self.at..].iter().position(|&byte| byte == b'\n');
        let line = self.take(len.ok_or_else(|| self.fails("a line without an end"))?)?;
        self.take(1)?;
        std::str::from_utf8(line).map(Into::into).map_err(|_| self.fails("a name that is no text"))
    }

    /// Names what is on top, or fetches what was named.
    fn remember(&mut self, word: u8) -> Result<(), PickleError> {
        let number = match word {
            0x94 => self.memo.len(),
            b'q' | b'h' => self.count(1)?,
            _ => self.count(4)?,
        };
        if matches!(word, b'h' | b'j') {
            let named = self.memo.get(number).cloned();
            return self.push(named.ok_or_else(|| self.fails(format!("nothing was named {number}")))?);
        }
        if number != self.memo.len() {
            return Err(self.fails("names that are not in order"));
        }
        let top = self.stack.last().ok_or_else(|| self.fails("nothing is there to be named"))?;
        let kept = match top {
            Value::Rows(_) | Value::Groups(_) => Value::Container,
            value => value.clone(),
        };
        self.memo.push(kept);
        Ok(())
    }

    /// The tuples that there are.
    fn tuple(&mut self, items: Vec<Value>) -> Result<(), PickleError> {
        let numbers = items.iter().map(|item| match item {
            Value::Number(number) => Some(*number),
            _ => None,
        });
        if let Some(numbers) = numbers.collect::<Option<Vec<u64>>>() {
            return self.push(Value::Numbers(numbers.into()));
        }
        let tuple = match items.as_slice() {
            [Value::Numbers(numbers)] => Value::Sizes(Rc::clone(numbers)),
            [Value::Text(name), Value::Numbers(shape), Value::Number(elements)] => {
                Value::Row(Rc::new(Row { name: Rc::clone(name), shape: Rc::clone(shape), elements: *elements }))
            }
            [Value::Groups(attributes), Value::Bytes(bytes)] if attributes.is_empty() => Value::State(Rc::clone(bytes)),
            [Value::Global(of), Value::State(bytes)] if of.ends_with(".ncclUniqueId") => {
                Value::Structure(Rc::clone(bytes))
            }
            _ => return Err(self.fails("a tuple that is neither a shape nor a tensor's description")),
        };
        self.push(tuple)
    }

    /// The two calls that there are, done without anybody being called.
    fn call(&mut self) -> Result<(), PickleError> {
        let (with, what) = (self.pop()?, self.pop()?);
        let Value::Global(what) = what else { return Err(self.fails("a call of what is no function")) };
        match (&*what, with) {
            ("torch.Size", Value::Sizes(sizes)) => self.push(Value::Numbers(sizes)),
            ("_ctypes._unpickle", Value::Structure(bytes)) => self.push(Value::Bytes(bytes)),
            (other, _) => Err(self.fails(format!("a call of {other}, which is not done here"))),
        }
    }

    fn append(&mut self, word: u8) -> Result<(), PickleError> {
        let items = if word == b'a' { vec![self.pop()?] } else { self.since_mark()? };
        let rows = items.into_iter().map(|item| match item {
            Value::Row(row) => Some(row),
            _ => None,
        });
        match (self.stack.last_mut(), rows.collect::<Option<Vec<_>>>()) {
            (Some(Value::Rows(list)), Some(rows)) => {
                list.extend(rows);
                Ok(())
            }
            _ => Err(self.fails("a list of what are no tensors' descriptions")),
        }
    }

    fn set(&mut self, word: u8) -> Result<(), PickleError> {
        let mut items = if word == b's' {
            let value = self.pop()?;
            vec![self.pop()?, value]
        } else {
            self.since_mark()?
        }
        .into_iter();
        let mut given = Vec::new();
        while let Some(dtype) = items.next() {
            match (dtype, items.next()) {
                (Value::Global(dtype), Some(Value::Rows(rows))) => given.push((dtype, rows)),
                _ => return Err(self.fails("a dictionary of other things than lists of tensors by dtype")),
            }
        }
        match self.stack.last_mut() {
            Some(Value::Groups(groups)) => {
                groups.extend(given);
                Ok(())
            }
            _ => Err(self.fails("no dictionary to put them into")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `pickle.dumps` of Python 3.11 with PyTorch 2.11: of tensors in two dtypes, one of them without a dimension, one with a long one.
    const TENSORS: &str = "800495a7000000000000007d94288c05746f726368948c0862666c6f617431369493945d94288c196d6f64656c2e656d6265645f\
        746f6b656e732e776569676874948c05746f726368948c0453697a659493944b0a4b048694859452944b2887948c03612e6294680829859452944b\
        0187948c01639468084b038594859452944b0387946568018c07666c6f617433329493945d948c01789468084b024a701101008694859452944ae0\
        220200879461752e";
    /// The same of vLLM's `ncclUniqueId`, in front of its 128 bytes, and behind them.
    const ID: (&str, &str) = (
        "800495ec000000000000008c075f637479706573948c095f756e7069636b6c659493948c34766c6c6d2e64697374726962757465642e6465766963\
        655f636f6d6d756e696361746f72732e70796e63636c5f77726170706572948c0c6e63636c556e6971756549649493947d944380",
        "948694869452942e",
    );

    fn bytes(hex: &str) -> Vec<u8> {
        hex::decode(hex).unwrap()
    }

    #[test]
    fn tensors_are_read_as_python_described_them() {
        let tensor = |name: &str, dtype, shape: &[u64]| Tensor { name: name.to_owned(), dtype, shape: shape.to_vec() };
        let want = vec![
            (
                Dtype::BF16,
                vec![
                    tensor("model.embed_tokens.weight", Dtype::BF16, &[10, 4]),
                    tensor("a.b", Dtype::BF16, &[]),
                    tensor("c", Dtype::BF16, &[3]),
                ],
            ),
            (Dtype::F32, vec![tensor("x", Dtype::F32, &[2, 70_000])]),
        ];
        assert_eq!(groups(&bytes(TENSORS)).unwrap(), want);
        assert_eq!(groups(&bytes("80047d942e")).unwrap(), vec![], "an empty dictionary");
    }

    #[test]
    fn a_groups_name_is_read_without_making_what_it_was() {
        let id: Vec<u8> = (0..128).collect();
        let pickled = [bytes(ID.0), id.clone(), bytes(ID.1)].concat();
        assert_eq!(unique_id(&pickled).unwrap(), id);
    }

    #[test]
    fn nothing_else_is_read_and_nothing_is_called() {
        let cases: &[(&str, &[u8], &str)] = &[
            ("a command", b"cos\nsystem\n(X\x02\0\0\0lstR.", "neither a shape nor"),
            ("a call of something else", b"cos\nsystem\nK\x01\x85\x85R.", "os.system, which is not done here"),
            ("an import by name alone", b"\x8c\x02os\x8c\x06system\x93.", "no dictionary"),
            ("an object", b"\x80\x04cbuiltins\neval\n)\x81.", "0x81"),
            ("a list in a list", b"\x80\x04]]a.", "no tensors' descriptions"),
            ("a list that holds itself", b"\x80\x04]\x94h\0a.", "no tensors' descriptions"),
            ("a negative size", b"\x80\x04J\xff\xff\xff\xff.", "no size can be"),
            ("a size past all numbers", b"\x80\x04\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.", "no size can be"),
            ("what breaks off", b"\x80\x04}", "breaks off"),
            ("nothing", b".", "nothing is there"),
        ];
        for (case, pickled, why) in cases {
            let said = groups(pickled).unwrap_err().to_string();
            assert!(said.contains(why), "case {case}: {said}");
        }
        let wrong = TENSORS.replace("4b2887", "4b2987");
        assert!(
            groups(&bytes(&wrong)).unwrap_err().to_string().contains("41 elements"),
            "elements that are not the shape's"
        );
        let other = TENSORS.replace(&hex::encode("bfloat16"), &hex::encode("bfloat17"));
        assert!(groups(&bytes(&other)).unwrap_err().to_string().contains("torch.bfloat17 is no dtype"));
    }

    proptest! {
        #[test]
        fn random_and_damaged_bytes_never_panic(
            random in prop::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(), to in any::<u8>()
        ) {
            let _ = groups(&random);
            let _ = unique_id(&random);
            let mut damaged = bytes(TENSORS);
            let at = at.index(damaged.len());
            damaged[at] = to;
            let _ = groups(&damaged);
        }
    }
}
