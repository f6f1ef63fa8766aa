//! `runtimeConfig.bandwidth`, as the reference's bandwidth plugin reads it: bits, a rate and a burst together or neither.
//! containerd capitalises the keys and asks for bursts of 2^32 - 1, CRI-O for eight times that.

use super::Failure;
use crate::BadValue;
use crate::bandwidth::{Bandwidth, Limit};
use crate::json::{Case, Keys};

pub(super) fn parse(runtime: &Keys<'_>) -> Result<Bandwidth, Failure> {
    let expected = "{\"ingressRate\": …, \"ingressBurst\": …, \"egressRate\": …, \"egressBurst\": …}";
    let keys = runtime.object_of("bandwidth", Case::Ignored, expected)?;
    Ok(Bandwidth {
        ingress: limit(&keys, "ingressRate", "ingressBurst")?,
        egress: limit(&keys, "egressRate", "egressBurst")?,
    })
}

/// 0 is as good as absent.
fn limit(keys: &Keys<'_>, rate_key: &str, burst_key: &str) -> Result<Option<Limit>, BadValue> {
    let with = |other: &str| format!("a number of bits from 8, {other}");
    let (per_second, at_once) =
        (with("a second, with a burst beside it"), with("under 4 GiB, with a rate beside it"));
    let number = |key: &str, expected: &str| keys.integer::<u64>(key, expected).map(|n| n.unwrap_or(0));
    let (rate, burst) = (number(rate_key, &per_second)?, number(burst_key, &at_once)?);
    match (rate / 8, u32::try_from(burst / 8)) {
        (0, Ok(0)) if rate == 0 && burst == 0 => Ok(None),
        (0, _) => Err(keys.bad(rate_key, &per_second)),
        (rate, Ok(burst)) if (1..u32::MAX).contains(&burst) => Ok(Some(Limit { rate, burst })),
        (_, _) => Err(keys.bad(burst_key, &at_once)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cni::Code;

    fn with(bandwidth: &Value) -> Result<Bandwidth, Failure> {
        let runtime = json!({ "bandwidth": bandwidth });
        parse(&Keys::top(runtime.as_object().expect("object"), Case::Exact))
    }

    #[test]
    fn what_runtimes_write() {
        let containerd =
            json!({ "IngressRate": 8_000_000, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0 });
        let limit = |rate, burst| Some(Limit { rate, burst });
        let one = Bandwidth { ingress: limit(1_000_000, u32::MAX / 8), egress: None };
        assert_eq!(with(&containerd), Ok(one));
        let crio = json!({ "egressRate": 8, "egressBurst": 8 * u64::from(u32::MAX) - 1 });
        assert_eq!(with(&crio), Ok(Bandwidth { ingress: None, egress: limit(1, u32::MAX - 1) }));
        for nothing in [Value::Null, json!({}), json!({ "ingressRate": 0 })] {
            assert!(with(&nothing).expect("nothing").is_unlimited(), "{nothing}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (bandwidth, part) in [
            (json!([]), "bandwidth = []: expected {\"ingressRate\""),
            (
                json!({ "ingressRate": 8000 }),
                "bandwidth.ingressBurst = null: expected a number of bits from 8",
            ),
            (
                json!({ "egressBurst": 8000 }),
                "bandwidth.egressRate = null: expected a number of bits from 8, a second",
            ),
            (json!({ "egressRate": 7, "egressBurst": 8000 }), "egressRate = 7"),
            (json!({ "egressRate": 8, "egressBurst": 7 }), "egressBurst = 7"),
            (json!({ "egressRate": 8, "egressBurst": 8 * u64::from(u32::MAX) }), "egressBurst = 34359738360"),
            (json!({ "egressRate": -1 }), "egressRate = -1"),
            (json!({ "egressRate": "1M", "egressBurst": 8 }), "egressRate = \"1M\""),
        ] {
            let failure = with(&bandwidth).expect_err(part);
            assert!(failure.is(Code::BadConfiguration) && failure.msg.contains(part), "{part}: {failure}");
        }
    }
}
