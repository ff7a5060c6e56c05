//! Any bytes into every decoder.

use bytes::BytesMut;

use super::Program;
use crate::{
    id::Channel,
    member::{BootId, Datagram, MacKey, NodeId, Record, Register, VmId},
    wire::{
        HEAD_LEN, Head, Hello, ShapeItem, VmstateSend, decode_reasons, decode_runs, encode_runs,
        join::{Acceptor, Dialler, Identity},
    },
};

/// Decodes `data` as each kind of message: no panic, and what decodes is a fixed point of encoding.
pub fn wire_decode(data: &[u8]) {
    let mut program = Program(data);
    let which = program.byte();
    let data = program.0;
    let me = Identity {
        vm: VmId([7; 16]),
        boot: BootId(1),
        key: MacKey([7; 16]),
    };
    match which % 9 {
        0 => {
            if let Some(bytes) = data.first_chunk::<HEAD_LEN>() {
                for channel in [Channel::Control, Channel::Ram(0), Channel::Net] {
                    if let Ok(head) = Head::decode(channel, bytes) {
                        assert!(u64::from(head.len) <= head.kind.limit());
                        assert!(head.kind.belongs_on(channel));
                        let mut again = BytesMut::new();
                        head.put(&mut again);
                        assert_eq!(
                            again.first_chunk().map(|b| Head::decode(channel, b)),
                            Some(Ok(head))
                        );
                    }
                }
            }
        }
        1 => {
            if let Ok(hello) = Hello::decode("hello", data) {
                // Broken text is replaced by longer text, which encoding may have to cut again.
                let whole = |item: &ShapeItem| item.name.len() < 256 && item.value.len() < 256;
                let again = Hello::decode("hello", &hello.encode());
                if hello.shape.iter().all(whole) {
                    assert_eq!(again, Ok(hello));
                } else {
                    assert!(again.is_ok());
                }
            }
        }
        2 => {
            if let Ok(runs) = decode_runs("pages", data) {
                let mut again = BytesMut::new();
                encode_runs(&runs, &mut again);
                assert!(again.len() <= data.len());
                assert_eq!(decode_runs("pages", &again), Ok(runs));
            }
        }
        3 => {
            if let Ok(send) = VmstateSend::decode(data) {
                assert_eq!(VmstateSend::decode(&send.encode()), Ok(send));
            }
        }
        4 => {
            let reasons = decode_reasons(data);
            assert!(
                reasons
                    .iter()
                    .map(alloc::string::String::len)
                    .sum::<usize>()
                    <= 3 * data.len()
            );
        }
        5 => {
            let acceptor = Acceptor::new(me, &[3; 24]);
            if let Some(join) = data.first_chunk() {
                let verdict = acceptor.judge(join);
                assert!(verdict.is_err(), "a join was forged");
                let _ = acceptor.answer(join, verdict.map(|_| ()));
            }
            if let Some(challenge) = data.first_chunk()
                && let Ok(dialler) = Dialler::new(me, Channel::Control, &[4; 24], challenge)
                && let Some(answer) = data.last_chunk()
            {
                assert!(dialler.joined(answer).is_err(), "an answer was forged");
            }
        }
        6 => {
            let _ = Datagram::decode(me.key, NodeId(2), data);
        }
        7 => {
            if let Ok(record) = Record::decode(data) {
                assert_eq!(Record::decode(&record.encode()), Ok(record));
            }
        }
        _ => {
            if let Ok(register) = Register::decode(data) {
                assert_eq!(Register::decode(&register.encode()), Ok(register));
            }
        }
    }
}
